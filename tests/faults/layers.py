"""Faults of what stands in for parts of megatron-core."""

from __future__ import annotations

from faults.mutant import Mutant

EDGES = "tests/tensor_parallel/test_edge_cases.py"
GDN = "tests/ssm/test_gated_delta_net.py"
GDN_RANKS = "tests/ssm/test_ranks.py"
KEEP = "tests/transformer/test_keep_in_fp32.py"
KEEP_CLASSES = "tests/transformer/test_keep_in_fp32_classes.py"
RESUME = "tests/distributed/test_resume.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit"

LAYERS = [
    Mutant(
        name="put the soft cap's class in front",
        file="tensor_parallel/output_layer.py",
        old="(Fp32OutputLayer, stock), names)",
        new="(stock,), names)",
        test=f"{EDGES}::TestLogits",
    ),
    Mutant(
        name="say nothing when inference rounds",
        file="tensor_parallel/output_layer.py",
        old="        _refuse_rounding_inference(self)\n",
        new="",
        test=f"{EDGES}::TestRefusals",
    ),
    Mutant(
        name="draw over loaded values",
        file="ssm/gated_delta_net.py",
        old='if weights == "initialized" and drawn_in_16_bits and layer.config.perform_initialization:',
        new="if drawn_in_16_bits:",
        test="tests/test_apply.py::TestInitialization",
    ),
    Mutant(
        name="guard with a second base",
        file="transformer/keep_in_fp32.py",
        old="types.new_class(base.__name__, (base,),",
        new="types.new_class(base.__name__, (Fp32ParameterGuard, base),",
        test=f"{KEEP_CLASSES}::TestKinds",
    ),
    Mutant(
        name="leave half of a failed keep_in_fp32",
        file="transformer/keep_in_fp32.py",
        old="    with contextlib.ExitStack() as undo:\n",
        new="    undo = contextlib.ExitStack()\n    if True:\n",
        test=f"{KEEP_CLASSES}::TestAllOrNothing",
    ),
    Mutant(
        name="keep a convolution in fp32",
        file="transformer/forward_dtypes.py",
        old='("A_log", "dt_bias", "out_norm.weight")',
        new='("A_log", "dt_bias", "out_norm.weight", "conv1d.weight")',
        test=f"{GDN}::TestConstruction",
    ),
    Mutant(
        name="reset dt_bias in fp32",
        file="transformer/forward_dtypes.py",
        old="if own is None or own.dtype == layer.config.params_dtype:",
        new="if True:",
        test=f"{GDN}::TestConstruction",
    ),
    Mutant(
        name="draw A_log twice from the tracker",
        file="ssm/gated_delta_net.py",
        old="self._draw_a_log(start)",
        new="self._draw_a_log(self._tracker_state())",
        test=f"{GDN}::TestConstruction",
    ),
    Mutant(
        name="do not check what was kept by hand",
        file="check.py",
        old="problems += _problems_of_kept_by_hand(chunks, kept)",
        new="pass",
        test="tests/test_check.py",
    ),
    Mutant(
        name="train by a hook without the optimizer repairs",
        file="apply.py",
        old="if report.parameters and hook.optimizer_repairs is None:",
        new="if False:",
        test="tests/test_hooks.py",
    ),
    Mutant(
        name="run every hook around the loss again",
        file="tensor_parallel/fused_loss.py",
        old="for key, hook in hooks.items() if _is_fsdp_hook(hook))",
        new="for key, hook in hooks.items())",
        test="tests/tensor_parallel/test_fused_loss.py::TestOneProcess",
    ),
    Mutant(
        name="take a vocabulary larger than the head",
        file="tensor_parallel/output_layer.py",
        old="if fp32.vocab_size is not None and fp32.vocab_size > layer.output_size:",
        new="if False:",
        test="tests/test_apply.py::TestInitialization",
    ),
    Mutant(
        name="leave the tracker behind a second draw of A_log",
        file="ssm/gated_delta_net.py",
        old="            generator.set_state(end)\n",
        new="",
        test="tests/test_apply.py::TestInitialization",
    ),
    Mutant(
        name="draw every A_log again from one state",
        file="ssm/gated_delta_net.py",
        old='int.from_bytes(digest[:8], "little") >> 1',
        new="1",
        test="tests/test_apply.py::TestInitialization",
    ),
    Mutant(
        name="make a Parameter of its own for the norm",
        file="ssm/gated_delta_net.py",
        old='own.weight = norm.get_parameter("weight")',
        new='own.weight = torch.nn.Parameter(norm.get_parameter("weight").detach().clone())',
        test=f"{GDN}::TestTransformerEngineNorm",
    ),
    Mutant(
        name="call a hooked norm in compiled code",
        file="ssm/gated_delta_net.py",
        old="if isinstance(self.out_norm, RMSNorm):",
        new="if False:",
        test=f"{GDN}::test_norm_and_gate_are_compiled_once_for_all_layers_whatever_hooks_they_have",
    ),
    Mutant(
        name="lose the embedding's own gradient",
        file="tensor_parallel/output_layer.py",
        old="weight.zero_out_wgrad = True",
        new="pass",
        test="tests/tensor_parallel/test_weight_gradient.py",
    ),
    Mutant(
        name="count passes in compiled code",
        file="transformer/counter.py",
        old="if not torch.compiler.is_compiling():",
        new="if True:",
        test=f"{EDGES}::TestSurroundings",
    ),
    Mutant(
        name="accept a last stage without a head",
        file="apply.py",
        old="    if missing:\n",
        new="    if False:\n",
        test="tests/test_apply.py::TestNothingMatched",
    ),
    Mutant(
        name="do not look at the optimizer's map",
        file="check.py",
        old="yield from _index_map_problems(trained, inner)",
        new="pass",
        test="tests/test_check.py",
    ),
    Mutant(
        name="gather over one rank",
        file="tensor_parallel/output_layer.py",
        old="if self.output_size_per_partition == self.output_size:",
        new="if False:",
        test="tests/tensor_parallel/test_output_layer.py",
    ),
    Mutant(
        name="round A_log once",
        file="ssm/gated_delta_net.py",
        old=".uniform_(*self.A_init_range).log_()",
        new=".uniform_(*self.A_init_range).log_().copy_(a_log.bfloat16())",
        test=f"{GDN}::TestConstruction",
    ),
    Mutant(
        name="drop the sum of out_norm's gradient",
        file="ssm/gated_delta_net.py",
        old="self._hook = weight.register_hook(sum_over_tp)",
        new="pass",
        test=f"{GDN_RANKS}::test_gradients_are_those_of_one_rank",
    ),
    Mutant(
        name="sum out_norm's gradient with sequence parallel too",
        file="ssm/gated_delta_net.py",
        old='if self.config.sequence_parallel and getattr(weight, "sequence_parallel", False):',
        new="if False:",
        test=f"{GDN_RANKS}::test_gradients_are_those_of_one_rank",
    ),
    Mutant(
        name="let Float16Module cast a kept parameter",
        file="transformer/keep_in_fp32.py",
        old="if id(tensor) not in kept or",
        new="if True or",
        test=f"{KEEP}::TestCasts",
    ),
    Mutant(
        name="let assign=True change the dtype",
        file="transformer/keep_in_fp32.py",
        old="if parameter.dtype != torch.float32:\n            module._parameters",
        new="if False:\n                self._parameters",
        test=f"{KEEP}::TestLoading",
    ),
    Mutant(
        name="lose the attributes of a new Parameter",
        file="transformer/keep_in_fp32.py",
        old="vars(module._parameters[leaf]).update(values)",
        new="pass",
        test=KEEP,
    ),
    Mutant(
        name="return the norm in the dtype of its input",
        file="transformer/norm.py",
        old=", gamma, eps).to(weight.dtype)",
        new=", gamma, eps).to(x.dtype)",
        test="tests/transformer/test_norm.py",
    ),
    Mutant(
        name="share Adam's step",
        file="optimizer/distributed.py",
        old='torch.full_like(state["step"], float(group["step"]))',
        new='state["step"]',
        test=f"{RESUME}[DP2-fully]",
    ),
    Mutant(
        name="leave the index map as it is",
        file="optimizer/distributed.py",
        old="for order, param in enumerate([*fp32, *float16]):",
        new="for order, param in enumerate([]):",
        test=f"{RESUME}[DP2-dp]",
    ),
    Mutant(
        name="forget a scale of logits that are not there",
        file="tensor_parallel/fused_loss.py",
        old="            scale=scale,\n            backward",
        new="            scale=1.0,\n            backward",
        test="tests/tensor_parallel/test_fused_loss.py::TestOneProcess",
    ),
    Mutant(
        name="defer logits that are gathered",
        file="tensor_parallel/output_layer.py",
        old='fused_loss != "off" and not gather:',
        new='fused_loss != "off":',
        test="tests/tensor_parallel/test_fused_loss.py::TestOneProcess",
    ),
]
