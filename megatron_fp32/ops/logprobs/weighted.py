"""The sum of weighted losses, with its gradients computed in the forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.accumulate import (
    FloatWeightGrad,
    LogitsGradient,
    finished_hidden_grad,
    room_for_hidden_grad,
)
from megatron_fp32.ops.logprobs.gradient import exponentials_gradient, gradient_bounds, gradient_vectors, live_tokens
from megatron_fp32.ops.logprobs.loss import TokenLoss
from megatron_fp32.ops.logprobs.options import (
    OperatorOptions,
    inverse_temperature_of,
    operator_options,
    rows_where,
    whole_hidden,
)
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.statistics import KeptLogits
from megatron_fp32.ops.logprobs.tokens import token_statistics
from megatron_fp32.ops.products.backward import accumulate_gradients
from megatron_fp32.ops.products.bias_grad import BiasGrad
from megatron_fp32.ops.products.chunks import even_chunks
from megatron_fp32.ops.products.fixed_order import why_not_fixed_order
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.hidden_grad import ChunkedHiddenSum, HiddenGrad
from megatron_fp32.ops.products.main_grad import follows_main_grad, weight_grad_for_autograd, weight_grad_target
from megatron_fp32.ops.products.operands import check_plain
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.ops.products.split import Pieces
from megatron_fp32.ops.products.weight_grad import WeightGrad
from megatron_fp32.validation import check_finite


class WeightedLoss(NamedTuple):
    """What `weighted_cross_entropy` returns."""

    total: Tensor
    """[] float32: the sum of loss * weight, to call backward on."""
    losses: Tensor
    """Loss of every token, in the shape of the labels, without a gradient; 0 where its weight is."""


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    bias: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_precision: GradPrecision = "bf16",
    invariant: bool = False,
    chunk_size: int | None = None,
) -> WeightedLoss:
    """Sum of the weighted losses, its gradients computed in the forward pass: three products, one chunk of memory.

    A softmax needs all of its logits before the first gradient. If you know the weights of the losses beforehand (for
    example a loss mask divided by a number of tokens), the gradients can be computed while a chunk of logits is still
    in memory. dW goes into `weight.main_grad` at once, where there is one, and dX is rounded. Nothing can scale them
    later without losing bits. So you pass the gradient that `total` will receive as `grad_scale`, and a backward pass
    with another gradient raises. A relative difference of 2^-20 is accepted, because a caller may divide twice where
    `grad_scale` is a product.

    A token with a weight of 0 is treated as a token whose label is ignored.

    Takes the arguments of `linear_cross_entropy` except `backward`, and:

    Args:
        loss_weights: [...], the shape of the labels; they receive no gradient.
        grad_scale: the gradient that `total` will receive: what the caller multiplies it with afterwards.

    Raises:
        As `linear_cross_entropy`; and ValueError for `loss_weights` of another shape, or that require a gradient.
        RuntimeError in the backward pass, when the gradient is not `grad_scale` (on CUDA at the end of the whole
        backward pass, so that the host does not wait; while a CUDA graph is captured, as a device-side assertion), or
        when it is run twice with a `main_grad`; in the forward pass, when saved-tensor hooks may run it twice then.
    """
    loss = TokenLoss(label_smoothing=label_smoothing, z_loss=z_loss)
    options = operator_options(
        hidden,
        weight,
        labels,
        vocab_parallel=vocab_parallel,
        logits_transform=logits_transform,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        invariant=invariant,
        chunk_size=chunk_size,
        mean=loss.mean,
        bias=bias,
    )
    check_plain(loss_weights=loss_weights, grad_scale=grad_scale)
    if loss_weights.shape != labels.shape or loss_weights.requires_grad:
        raise ValueError(
            f"expected loss_weights without gradient and of the labels' shape {tuple(labels.shape)}, got "
            f"{tuple(loss_weights.shape)}, requires_grad={loss_weights.requires_grad}"
        )
    # A masked token is an ignored one from here on.
    labels = torch.where(loss_weights.to(labels.device, torch.float32) == 0, ignore_index, labels)
    inverse_temperature = inverse_temperature_of(temperature, labels, ignore_index)
    if not isinstance(grad_scale, Tensor):
        check_finite("grad_scale", grad_scale)
        # A tensor made from a number on the host would make the host wait.
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=hidden.device)
    elif grad_scale.numel() != 1 or not grad_scale.is_floating_point() or grad_scale.requires_grad:
        raise ValueError(
            "grad_scale must be a number, or a floating-point tensor of one number without gradient, got "
            f"{tuple(grad_scale.shape)} of {grad_scale.dtype}, requires_grad={grad_scale.requires_grad}"
        )
    grad_scale = grad_scale.reshape(())
    return WeightedLoss(
        *_eager(hidden, weight, labels, loss_weights, inverse_temperature, grad_scale.float(), options, loss, bias)
    )


@torch.compiler.disable
def _eager(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    inverse_temperature: Tensor,
    grad_scale: Tensor,
    options: OperatorOptions,
    loss: TokenLoss,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wanted = torch.is_grad_enabled()
    return _WeightedCrossEntropy.apply(
        hidden, weight, labels, loss_weights, inverse_temperature, grad_scale, options, loss, wanted, bias
    )


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        inverse_temperature: Tensor,
        grad_scale: Tensor,
        options: OperatorOptions,
        loss: TokenLoss,
        wanted: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        flat = labels.reshape(-1)
        ignored = flat == options.softmax.ignore_index
        weights = torch.where(ignored, 0.0, loss_weights.reshape(-1).float())
        needs = tuple(wanted and ctx.needs_input_grad[i] for i in (0, 1, -1))
        ctx.in_main_grad = needs[1] and follows_main_grad(weight)
        if ctx.in_main_grad and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            raise RuntimeError(
                "weighted_cross_entropy adds dW to main_grad in its forward pass, which saved-tensor hooks may run "
                "twice (torch.utils.checkpoint with use_reentrant=False does). Use linear_cross_entropy there"
            )
        step = _GradientInForward(hidden, weight, flat, options, bias=bias, needs=needs)
        result = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        losses = result.view(-1)
        for tokens in step.chunks:
            kept = step.room(tokens)
            statistics = token_statistics(
                step.hidden[tokens],
                weight,
                flat[tokens],
                inverse_temperature[tokens],
                options.softmax,
                mean=options.mean,
                keep=kept,
                chunk_size=options.chunk_size,
                bias=bias,
            )
            losses[tokens] = loss(statistics.logprob, statistics.logsumexp, statistics.mean)
            if kept is None:
                continue
            upstream = loss.gradients(weights[tokens] * grad_scale, statistics.logsumexp)
            vectors = gradient_vectors(
                statistics, inverse_temperature[tokens], options.softmax, flat[tokens], mean_of=options.mean, **upstream
            )
            step.accumulate(tokens, kept, vectors, flat[tokens])
        ctx.weight_owner, ctx.target = weight, step.target if ctx.in_main_grad else None
        ctx.handed_out = False
        dw = None if step.target is None or ctx.in_main_grad else step.target.target
        ctx.save_for_backward(step.finish(), dw, step.grad_bias(), grad_scale)
        ctx.mark_non_differentiable(result)
        return (losses * weights).sum(), result

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias, grad_scale = ctx.saved_tensors
        if ctx.in_main_grad and ctx.handed_out:
            raise RuntimeError(
                "weighted_cross_entropy has added dW to main_grad in its forward pass: a second backward pass would "
                "need a second dW. Use linear_cross_entropy"
            )
        _check_upstream(upstream, grad_scale)
        if ctx.in_main_grad:
            ctx.handed_out = True
            grad_weight = weight_grad_for_autograd(ctx.weight_owner, ctx.target)
        return grad_hidden, grad_weight, *([None] * 7), grad_bias


def _check_upstream(upstream: Tensor, grad_scale: Tensor) -> None:
    """Raise RuntimeError unless the gradient of the total is the one that its gradients were computed for."""
    as_said = (upstream - grad_scale).abs() <= 2.0**-20 * grad_scale.abs()
    if not upstream.is_cuda:
        _raise_unless(as_said, upstream, grad_scale)
    elif torch.cuda.is_current_stream_capturing():
        torch._assert_async(as_said, _OTHER_GRADIENT.format("another", "grad_scale"))
    else:
        answer = torch.empty(3, dtype=torch.float32, pin_memory=True)
        answer.copy_(torch.stack([as_said.float(), upstream.float(), grad_scale]), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def check() -> None:
            copied.synchronize()
            _raise_unless(*answer)

        # By then the host has launched the rest of the backward pass, so the device does not run out of work.
        torch.autograd.Variable._execution_engine.queue_callback(check)


def _raise_unless(as_said: Tensor, upstream: Tensor, grad_scale: Tensor) -> None:
    if not as_said:
        raise RuntimeError(_OTHER_GRADIENT.format(upstream.item(), grad_scale.item()))


_OTHER_GRADIENT = (
    "weighted_cross_entropy computed its gradients in the forward pass for grad_scale; its total received the gradient "
    "{}, and grad_scale was {}. Pass the gradient that total will receive as grad_scale"
)


def _can_keep_exponentials(hidden: Tensor, weight: Tensor, options: OperatorOptions) -> bool:
    """Whether exp(z - top) in float16 is enough for dY, and there is a kernel for it."""
    enough = options.pieces == 1 and options.softmax.transform.softcap is None and weight.dtype == torch.bfloat16
    return enough and weight.is_cuda and why_not_fixed_order(hidden, weight) is None


def _columns_of(dy: Tensor) -> Callable[[slice], Pieces]:
    return lambda rows: Pieces((dy[:, rows],), None)


class _GradientInForward:
    """Chunks of tokens whose logits are kept until their gradients are computed."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: OperatorOptions,
        *,
        bias: Tensor | None,
        needs: tuple[bool, ...],
    ) -> None:
        """`needs` says for the hidden states, the weight and the bias whether a gradient is needed."""
        self._weight, self._options = weight, options
        self._like = hidden
        self.hidden = whole_hidden(hidden, weight, labels, options)
        self._live = torch.zeros(len(self.hidden), dtype=torch.bool, device=hidden.device)
        tokens, device = len(self.hidden), hidden.device
        wanted = any(needs)
        exponentials = bias is None and _can_keep_exponentials(self.hidden, weight, options)
        largest = options.chunk_size
        if largest is None:
            per_token = (2 if exponentials else 4) * weight.shape[0]
            parallel = options.softmax.shard.group is not None
            largest = workspace.workspace_bytes(device, parallel=parallel) // per_token if wanted else tokens
        self.chunks = even_chunks(tokens, largest)
        longest = max((c.stop - c.start for c in self.chunks), default=0)
        self._pieces = options.pieces_of(hidden, weight)
        self._kept = KeptLogits.allocate(longest, weight, exponentials=exponentials) if wanted else None
        self.target = weight_grad_target(weight) if needs[1] else None
        self._sums = FloatWeightGrad(self.target, blocks=max(1, len(self.chunks)))
        self._bias_grad = BiasGrad(bias) if bias is not None and needs[2] else None
        self._dx: Tensor | None = None
        self._reduction: HiddenGrad | None = None
        if needs[0] and (options.softmax.shard.group is not None or options.softmax.invariant):
            self._reduction = room_for_hidden_grad(tokens, weight, options)
        elif needs[0]:
            self._dx = torch.empty(tokens, weight.shape[1], dtype=hidden.dtype, device=device)

    def room(self, tokens: slice) -> KeptLogits | None:
        """Room for the chunk's logits; None when no gradient is needed."""
        return None if self._kept is None else self._kept.rows(slice(0, tokens.stop - tokens.start))

    def accumulate(self, tokens: slice, kept: KeptLogits, vectors: Tensor, labels: Tensor) -> None:
        softmax = self._options.softmax
        local = softmax.shard.local_labels(labels)
        self._live[tokens] = live_tokens(vectors)
        weight_grad = self._sums.part(first=tokens is self.chunks[0])
        if kept.tops is None:
            grad = LogitsGradient(
                self.hidden[tokens], self._weight, labels=local, vectors=vectors, kept=kept, consume=True,
                softmax=softmax, pieces=self._pieces,
            )  # fmt: skip
            # Two pieces take the place of the logits, three need memory of their own.
            columns = workspace.GRADIENT_COLUMNS // (4 if self._pieces == 3 else 1)
            self._products(grad, tokens, weight_grad, with_dx=True, bounds=grad.bounds, columns=columns)
            return
        # All of dY is there, in the memory of the exponentials: dX of fewer tokens needs less of it in fp32.
        dy = exponentials_gradient(kept, vectors, local, softmax)
        for part in even_chunks(len(dy), workspace.HIDDEN_GRAD_TOKENS):
            rows = slice(tokens.start + part.start, tokens.start + part.stop)
            bounds = functools.partial(gradient_bounds, vectors[:, part], softmax)
            self._products(_columns_of(dy[part]), rows, None, with_dx=True, bounds=bounds)
        self._products(_columns_of(dy), tokens, weight_grad, with_dx=False, columns=max(1, dy.shape[1]))

    def _products(
        self,
        grad: Callable[[slice], Pieces],
        tokens: slice,
        weight_grad: WeightGrad | None,
        *,
        with_dx: bool,
        bounds: Callable[[], Tensor] | None = None,
        columns: int | None = None,
    ) -> None:
        dx, hidden_sum = None, None
        if with_dx and self._reduction is not None:
            hidden_sum = self._reduction.of(tokens, bounds)
        elif with_dx and self._dx is not None:
            dx = self._dx[tokens]
            dx = dx if dx.dtype == torch.float32 else torch.empty_like(dx, dtype=torch.float32)
            hidden_sum = ChunkedHiddenSum(dx, valid=self._options.softmax.shard.valid_columns)
        if hidden_sum is None and weight_grad is None and self._bias_grad is None:
            return
        accumulate_gradients(
            grad,
            weight=self._weight,
            pieces=self._options.pieces,
            chunk=columns,
            hidden_sum=hidden_sum,
            hidden=lambda: rows_where(self._live[tokens], self.hidden[tokens]),
            weight_grad=weight_grad,
            hidden_grad_done=lambda: None,
            bias_grad=self._bias_grad,
        )
        if dx is not None and self._dx is not None and self._dx.dtype != torch.float32:
            self._dx[tokens] = dx

    def grad_bias(self) -> Tensor | None:
        """dbias of this rank's columns, which all tokens are in."""
        return None if self._bias_grad is None else self._bias_grad.finish()

    def finish(self) -> Tensor | None:
        """dX in the shape and dtype of the hidden states, summed over the ranks; dW is where it belongs."""
        if not self.chunks and self.target is not None and not self.target.accumulate:
            self.target.target.zero_()
        self._sums.finish()
        if self._reduction is not None:
            self._reduction.start()
            return finished_hidden_grad(self._reduction, self._live, self._like, self._options)
        if self._dx is None:
            return None
        return self._dx.masked_fill_(~self._live[:, None], 0.0).view(self._like.shape)
