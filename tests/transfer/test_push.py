"""What a trainer may write, and which channel it takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.errors import TransferError
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.transfer.sender import Connection, Push, choose_channel, describe_device, sha256
from megatron_fp32.weights.tensors import TensorInfo

A = torch.arange(6, dtype=torch.float32).view(2, 3)
B = torch.zeros(3, dtype=torch.bfloat16)
TENSORS = {"a": TensorInfo(dtype=torch.float32, shape=(2, 3)), "b": TensorInfo(dtype=torch.bfloat16, shape=(3,))}


class Done:
    """A group whose broadcasts are over at once."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def broadcast(self, buffer: Tensor) -> Done:
        self.sent.append(buffer.numpy().tobytes())
        return self

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def connection() -> Iterator[Connection]:
    made = Connection(workers=1, listen="127.0.0.1", device=torch.device("cpu"), timeout=1.0)
    made.kind, made.group = "gloo", Done()  # type: ignore[assignment]
    yield made
    made.close()


def push(connection: Connection, bucket_bytes: int = 256) -> Push:
    return Push(connection, Manifest(version=1, tensors=TENSORS, bucket_bytes=bucket_bytes, sha256=False), lambda: None)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", B, r"expected tensor 'a' of .*, got 'b': torch\.bfloat16 \(3,\)"),
        ("c", A, r"expected tensor 'a' of .*, got 'c': torch\.float32 \(2, 3\)"),
        ("a", A.double(), r"got 'a': torch\.float64 \(2, 3\)"),
        ("a", A.view(3, 2), r"got 'a': torch\.float32 \(3, 2\)"),
        ("a", A.view(6), r"got 'a': torch\.float32 \(6,\)"),
        ("a", A[:1], r"got 'a': torch\.float32 \(1, 3\)"),
    ],
)
def test_a_tensor_that_was_not_announced_here_is_refused(
    connection: Connection, name: str, tensor: Tensor, message: str
) -> None:
    begun = push(connection)
    with pytest.raises(TransferError, match=message):
        begun.write(name, tensor)
    begun.write("a", A)
    with pytest.raises(TransferError, match=r"expected tensor 'b' of"):
        begun.write("a", A)


def test_a_missing_tensor_is_named(connection: Connection) -> None:
    begun = push(connection)
    with pytest.raises(TransferError, match=r"expected every tensor of the manifest, got none for 'a'"):
        begun.finish()
    begun.write("a", A)
    with pytest.raises(TransferError, match=r"got none for 'b'"):
        begun.finish()


def test_a_tensor_too_many_is_refused(connection: Connection) -> None:
    begun = push(connection)
    begun.write("a", A)
    begun.write("b", B)
    with pytest.raises(TransferError, match=r"expected no more tensors, got 'c'"):
        begun.write("c", B)
    begun.finish()


def test_a_parameter_is_sent_as_its_values(connection: Connection) -> None:
    begun = push(connection)
    begun.write("a", torch.nn.Parameter(A.t().contiguous()).t())
    begun.write("b", B)
    assert not connection.slots(1)[0][0].requires_grad
    assert connection.group.sent[0][:24] == A.numpy().tobytes()  # type: ignore[union-attr]


def test_a_larger_push_gets_larger_buffers(connection: Connection) -> None:
    push(connection)
    first, generation = connection.slots(1)
    push(connection, bucket_bytes=4096)
    second, later = connection.slots(1)
    assert [len(slots) for slots in (first, second)] == [2, 2]
    assert second[0].numel() > first[0].numel()
    assert later == generation + 1
    assert connection.slots(1)[0] is second


def test_nothing_is_sent_over_a_connection_without_workers() -> None:
    connection = Connection(workers=1, listen="127.0.0.1", device=torch.device("cpu"), timeout=1.0)
    with pytest.raises(TransferError, match=r"is closed, or has not met its workers"):
        push(connection)
    connection.close()


def test_reports_end_with_the_failure_of_a_worker(connection: Connection) -> None:
    begun = push(connection)
    connection.messages.put(f"{begun.name}/failed", "worker 0: ValueError: no room")
    with pytest.raises(TransferError, match=r"^the engine has failed: worker 0: ValueError: no room$"):
        begun.reports(5.0, lambda: None)


def test_a_push_leaves_no_manifest_in_the_store(connection: Connection) -> None:
    sizes = []
    for _ in range(2):
        begun = push(connection)
        begun.write("a", A)
        begun.write("b", B)
        begun.finish()
        connection.messages.put(f"{begun.name}/report/0", {"rank": 0})
        assert begun.reports(1.0, lambda: None) == [{"rank": 0}]
        sizes.append(connection.messages.store.num_keys())
    assert sizes[0] == sizes[1]


def test_a_long_error_is_cut(connection: Connection) -> None:
    begun = push(connection)
    begun.stop(ValueError("x" * 100_000))
    assert len(connection.messages.get(f"{begun.name}/stop", 1.0)) < 3000


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [  # sha256sum of the bytes
        (torch.tensor([], dtype=torch.int8), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (
            torch.tensor(97, dtype=torch.uint8),
            "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
        ),
        (
            torch.tensor([[97, 99], [98, 0]], dtype=torch.uint8).t()[:, :2].reshape(-1)[:3],
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        ),
    ],
)
def test_sha256_is_the_one_of_the_bytes(tensor: Tensor, expected: str) -> None:
    assert sha256(tensor) == expected


def at(device: str, machine: str = "m", pid: int = 1) -> dict[str, Any]:
    return {"device": device, "machine": machine, "pid": pid, "host": machine}


CPU, GPU = at("cpu"), at("G0")
CPU_WORKER, OTHER_GPU = at("cpu", pid=2), at("G1", pid=2)
SAME_GPU, SAME_PROCESS = at("G0", pid=2), at("G0")
AWAY, SAME_GPU_AWAY = at("G2", machine="n", pid=3), at("G3", machine="n", pid=1)

NO_GPU = "needs a GPU in every process"
NO_CPU = "gloo sends CPU tensors, and every process has a GPU"
ONE_GPU = "NCCL cannot connect two processes on one GPU"
FAR = "CUDA IPC does not leave the machine"
ITSELF = "CUDA IPC cannot connect a process with itself"

TABLE = [  # the trainer, the workers, and what is wrong with gloo, NCCL and IPC
    (CPU, [CPU_WORKER], ("", NO_GPU, NO_GPU)),
    (CPU, [CPU], ("", NO_GPU, NO_GPU)),
    (CPU, [OTHER_GPU], ("", NO_GPU, NO_GPU)),
    (GPU, [CPU_WORKER], ("", NO_GPU, NO_GPU)),
    (GPU, [OTHER_GPU, CPU_WORKER], ("", NO_GPU, NO_GPU)),
    (GPU, [OTHER_GPU], (NO_CPU, "", "")),
    (GPU, [AWAY], (NO_CPU, "", FAR)),
    (GPU, [OTHER_GPU, AWAY], (NO_CPU, "", FAR)),
    (GPU, [SAME_GPU_AWAY], (NO_CPU, "", FAR)),
    (GPU, [SAME_GPU], (NO_CPU, ONE_GPU, "")),
    (GPU, [SAME_GPU, OTHER_GPU], (NO_CPU, ONE_GPU, "")),
    (GPU, [OTHER_GPU, {**OTHER_GPU, "pid": 5}], (NO_CPU, ONE_GPU, "")),
    (GPU, [SAME_GPU, AWAY], (NO_CPU, ONE_GPU, FAR)),
    (GPU, [SAME_PROCESS], (NO_CPU, ONE_GPU, ITSELF)),
    (GPU, [SAME_PROCESS, AWAY], (NO_CPU, ONE_GPU, FAR)),
]


@pytest.mark.parametrize(("trainer", "workers", "wrong"), TABLE, ids=itertools.count())
def test_which_channel_reaches_whom(trainer: Any, workers: list[Any], wrong: tuple[str, str, str]) -> None:
    kinds = dict(zip(("gloo", "nccl", "ipc"), wrong, strict=True))
    for kind, reason in kinds.items():
        if reason:
            with pytest.raises(TransferError, match=f"^channel '{kind}' does not reach all workers: .*{reason}"):
                choose_channel(kind, trainer, workers)
        else:
            assert choose_channel(kind, trainer, workers) == kind
    if all(wrong):
        with pytest.raises(TransferError, match=f"^no channel reaches all workers: {'; .*'.join(wrong)}"):
            choose_channel("auto", trainer, workers)
    else:
        assert choose_channel("auto", trainer, workers) == next(kind for kind, reason in kinds.items() if not reason)


def test_an_unknown_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"channel must be one of gloo, nccl, ipc and auto, got 'tcp'"):
        choose_channel("tcp", CPU, [CPU_WORKER])


def test_a_process_describes_itself() -> None:
    import os

    found = describe_device(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["pid"] == os.getpid()
    assert found["machine"]
