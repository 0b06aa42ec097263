"""Tests. A folder here has the tests of the room of the package with its name.

Four folders are different: `distributed` trains on ranks, `engine` needs a vLLM (`make test-engine`), `gpu` needs CUDA,
`smoke` runs with other releases of megatron-core. `messages` has what users see when something is wrong.

What tests share:

| where | what |
|---|---|
| `conftest.py` | fixtures: pools of ranks, megatron-core in this process, checkpoints and what imports make of them |
| `support.py` | memory full of NaN, stock models, the command line, a child process with little memory |
| `qwen3_5.py` | sizes of small Qwen3.5 models, and checkpoints with them |
| `families.py` | small checkpoints of every family, written by transformers |
| `checkpoint/support.py` | what checkpoints hold, changes of them, what a comparison says of them |
| `checkpoint/layouts.py` | models on the ranks of a parallel layout, loaded and saved by megatron-core |
| `distributed/jobs.py`, `distributed/optimizer_states.py` | training on ranks, and the states of optimizers |
| `output_layer/layers.py`, `gated_delta_net/layers.py`, `gpu/models.py` | layers and models, stock and fp32 |
| `ops/logprobs_cases.py`, `ops/fp8_cases.py`, `ops/hostile_tokens.py` | inputs of operators, and what is true of them |
| `ops/interpreter.py`, `ops/interpreted_*.py` | kernels in Triton's interpreter, each case a test |
| `transfer/checksum_cases.py` | the checksum's kernel, in the interpreter and on a GPU |
| `ops/live_bytes.py` | how much memory tensors take on the CPU |
| `transfer/processes.py` | a trainer and workers in processes of their own, and what each does wrong |
| `recipe_stubs/` | stand-ins for the programs of the recipes |
| `groups.py` | which tests run in one worker |
| `mutants.py`, `faults/` | `make mutants`: faults in the package that a test must notice |
"""
