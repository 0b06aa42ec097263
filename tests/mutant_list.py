"""The faults that `mutants.py` puts into the package, each with the test that must notice."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A one-line fault."""

    name: str
    file: str
    old: str
    new: str
    test: str


OPS, RANKS = "tests/ops/test_logits.py", "tests/tensor_parallel/test_ranks.py"
PRODUCTS, EDGES = "tests/ops/test_products.py", "tests/tensor_parallel/test_edge_cases.py"
MAIN_GRAD, GDN = "tests/ops/test_main_grad.py", "tests/ssm/test_gated_delta_net.py"
GDN_RANKS, KEEP = "tests/ssm/test_ranks.py", "tests/transformer/test_keep_in_fp32.py"
RESUME = "tests/distributed/test_resume.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit"
MEGATRON, CONVERT = "tests/checkpoint/test_through_megatron.py", "tests/checkpoint/test_convert.py"

MUTANTS = [
    Mutant(
        name="round the logits on the CPU",
        file="ops/logits/gemm.py",
        old="return torch.mm(a.float(), b.float(), out=out)",
        new="return out.copy_(torch.mm(a, b))",
        test=f"{OPS}::TestAgainstFloat64",
    ),
    Mutant(
        name="drop the dgrad sum",
        file="ops/logits/ranks.py",
        old="elif self._reduce:",
        new="elif False:",
        test=f"{RANKS}::test_errors_are_those_of_one_rank",
    ),
    Mutant(
        name="sum the dgrad twice",
        file="ops/logits/ranks.py",
        old="self._work = dist.all_reduce(self.partial, group=self._group, async_op=True)",
        new="self._work = [dist.all_reduce(self.partial, group=self._group, async_op=True) for _ in '12'][1]",
        test=f"{RANKS}::test_errors_are_those_of_one_rank",
    ),
    Mutant(
        name="round each rank's dgrad before the sum",
        file="ops/logits/ranks.py",
        old='"""Begin the sum; it overlaps with what is still computed."""',
        new="self.partial = self.partial.bfloat16().float()",
        test="tests/ops tests/tensor_parallel",
    ),
    Mutant(
        name="skip grad_added_to_main_grad",
        file="ops/logits/main_grad.py",
        old="weight.grad_added_to_main_grad = True",
        new="weight.grad_added_to_main_grad = False",
        test=MAIN_GRAD,
    ),
    Mutant(
        name="return garbage where zeros are asked for",
        file="ops/logits/main_grad.py",
        old='torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty',
        new="torch.empty",
        test=MAIN_GRAD,
    ),
    Mutant(
        name="accumulate dW in bf16",
        file="ops/logits/products.py",
        old="sum_of_products_(target, products, accumulate=self.accumulate)",
        new="target.copy_(sum_of_products_(target, products, accumulate=self.accumulate).bfloat16())",
        test=MAIN_GRAD,
    ),
    Mutant(
        name="forget the chunks before the last",
        file="ops/logits/products.py",
        old="accumulate=rows.start > 0)",
        new="accumulate=False)",
        test=PRODUCTS,
    ),
    Mutant(
        name="split without what was left",
        file="ops/logits/split.py",
        old="rest = torch.where(wide.isfinite(), rest - wide, 0.0)",
        new="rest = torch.zeros_like(rest)",
        test="tests/ops/test_split.py",
    ),
    Mutant(
        name="let float16 pieces run out of range",
        file="ops/logits/split.py",
        old="shift = (SPLIT_EXPONENT - exponent).clamp(-126, 126)",
        new="shift = exponent * 0",
        test=f"{PRODUCTS}::test_split_gradients_keep_their_bits",
    ),
    Mutant(
        name="round an fp32 residual stream",
        file="ops/logits/products.py",
        old="pieces = split(x, 3, weight.dtype, scale=split_scale(x, 3, weight.dtype))\n    sum",
        new="pieces = split(x, 1, weight.dtype)\n    sum",
        test=f"{EDGES}::TestLogits",
    ),
    Mutant(
        name="compute what was deferred",
        file="ops/logits/autograd.py",
        old="                needs_weight = False",
        new="                pass",
        test="tests/tensor_parallel/test_deferred.py",
    ),
    Mutant(
        name="declare the wrong dtype",
        file="ops/logits/custom_op.py",
        old="weight.shape[0], dtype=torch.float32)",
        new="weight.shape[0])",
        test="tests/ops/test_custom_op.py",
    ),
    Mutant(
        name="compile dW into the graph and lose main_grad",
        file="ops/logits/autograd.py",
        old="if traced and not parallel and not follows_main_grad(weight)",
        new="if traced and not parallel",
        test="tests/ops/test_custom_op.py",
    ),
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
        old="if draw and drawn_in_16_bits and layer.config.perform_initialization:",
        new="if drawn_in_16_bits:",
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
        new=".uniform_(*self.A_init_range).log_().copy_(self.A_log.bfloat16())",
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
        old="if parameter.dtype != torch.float32:\n                self._parameters",
        new="if False:\n                self._parameters",
        test=f"{KEEP}::TestLoading",
    ),
    Mutant(
        name="lose the attributes of a new Parameter",
        file="transformer/keep_in_fp32.py",
        old="vars(self._parameters[leaf]).update(values)",
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
        file="optimizer/native_fp32.py",
        old='torch.full_like(state["step"], float(group["step"]))',
        new='state["step"]',
        test=f"{RESUME}[DP2-fully]",
    ),
    Mutant(
        name="leave the index map as it is",
        file="optimizer/native_fp32.py",
        old="for order, param in enumerate([*fp32, *float16]):",
        new="for order, param in enumerate([]):",
        test=f"{RESUME}[DP2-dp]",
    ),
    Mutant(
        name="swap beta and alpha",
        file="models/qwen3_5.py",
        old='f"{source}in_proj_b.weight", f"{target}in_proj.weight.beta"',
        new='f"{source}in_proj_a.weight", f"{target}in_proj.weight.beta"',
        test=f"{MEGATRON}::TestParity::test_one_rank",
    ),
    Mutant(
        name="swap gate and up",
        file="models/qwen3_5.py",
        old='[(f"{hf}mlp.gate_proj.weight", ffn), (f"{hf}mlp.up_proj.weight", ffn)]',
        new='[(f"{hf}mlp.up_proj.weight", ffn), (f"{hf}mlp.gate_proj.weight", ffn)]',
        test=f"{MEGATRON}::TestParity::test_one_rank",
    ),
    Mutant(
        name="cast in the converter",
        file="checkpoint/convert.py",
        old="for target, tensor in zip(mapping.megatron, mapping.to_megatron(tensors), strict=True):",
        new="for target, tensor in zip(mapping.megatron, [t.bfloat16() for t in mapping.to_megatron(tensors)]):",
        test=f"{CONVERT}::TestRoundTrip",
    ),
    Mutant(
        name="ignore the exact originals",
        file="models/mapping.py",
        old="    invertible = False",
        new="    invertible = True",
        test=f"{CONVERT}::TestRoundTrip",
    ),
    Mutant(
        name="round what was trained in fp32",
        file="checkpoint/convert.py",
        old="infos[name] = TensorInfo(dtype=torch.float32, shape=info.shape)",
        new="infos[name] = info",
        test=f"{MEGATRON}::TestTrained",
    ),
    Mutant(
        name="do not read back",
        file="checkpoint/convert.py",
        old="if digest(tensor) != expected:",
        new="if False:",
        test=f"{CONVERT}::TestVerification",
    ),
    Mutant(
        name="unpickle anything",
        file="checkpoint/torch_dist.py",
        old="if name not in _ALLOWED.get(module, ()):",
        new="if False:",
        test="tests/checkpoint/test_torch_dist.py::TestDamage",
    ),
    Mutant(
        name="take 1 - p of the label from p",
        file="ops/logprobs/gradient.py",
        old="of_all * statistics.rest",
        new="of_all * (1 - statistics.logprob.exp())",
        test="tests/ops/test_logprobs.py::TestAdversarial::test_a_confident_model_keeps_its_digits",
    ),
    Mutant(
        name="give padding of the vocabulary probability",
        file="ops/logprobs/statistics.py",
        old="min(raw.shape[1], shard.valid_columns) - column",
        new="raw.shape[1] - column",
        test="tests/ops/test_logprobs.py::TestAdversarial",
    ),
    Mutant(
        name="add dW of chunks in bfloat16",
        file="ops/logprobs/accumulate.py",
        old="blocks > 1 and",
        new="blocks > 999 and",
        test="tests/ops/test_logprobs.py::TestAutograd",
    ),
    Mutant(
        name="let the upstream gradient of ignored labels through",
        file="ops/logprobs/autograd.py",
        old="flat[0] = torch.where(labels == options.shard.ignore_index, 0.0, flat[0])",
        new="pass",
        test="tests/ops/test_logprobs.py::TestAdversarial",
    ),
    Mutant(
        name="look for the most probable tokens in one block",
        file="ops/logprobs/topk.py",
        old="min(k, order.shape[1])",
        new="min(1, order.shape[1])",
        test="tests/ops/test_logprobs.py::TestTopK",
    ),
    Mutant(
        name="combine each rank's blocks before the gather",
        file="ops/logprobs/statistics.py",
        old="if not shard.invariant or shard.group is None:",
        new="if True:",
        test="tests/ops/test_logprobs_ranks.py::test_invariant_over_ranks",
    ),
    Mutant(
        name="multiply as many rows as there are",
        file="ops/logits/fixed_order.py",
        old="mm_fp32(x, block.t(), out=product)",
        new="mm_fp32(x[: rows.stop - row], block.t(), out=product[: rows.stop - row])",
        test="tests/ops/test_fixed_order.py",
    ),
    Mutant(
        name="let dW go into main_grad twice",
        file="ops/logprobs/weighted.py",
        old="ctx.handed_out = True",
        new="ctx.handed_out = False",
        test="tests/ops/test_linear_cross_entropy.py::TestWeighted::test_a_second_backward_pass",
    ),
    Mutant(
        name="forget the gradient that was announced",
        file="ops/logprobs/weighted.py",
        old="weights[tokens] * grad_scale",
        new="weights[tokens] * 1.0",
        test="tests/ops/test_linear_cross_entropy.py::TestWeighted",
    ),
    Mutant(
        name="write statistics of a block that is not there",
        file="ops/logits/project_triton.py",
        old="inside = (rows < tokens) & (column < columns)",
        new="inside = rows < tokens",
        test="tests/ops/test_logprobs_kernels.py",
    ),
    Mutant(
        name="add half of a tile of dW twice",
        file="ops/logits/weight_grad_triton.py",
        old="column + half, right",
        new="column, right",
        test="tests/ops/test_logprobs_kernels.py",
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
