"""A real vLLM on the CPU, in an environment of its own. `make test-engine` builds the environment and runs these tests.

- `server.py` starts vLLM's OpenAI server and speaks HTTP with it.
- `site/`, `visible_weights.py` and `block_fp8_kernel.py` run inside the server's processes.
"""
