"""Faults of pushes into SGLang."""

from __future__ import annotations

from faults.mutant import Mutant

TESTS = "tests/streaming/test_sglang.py"
FAILURES = "tests/streaming/test_sglang_failures.py"
SINK = "streaming/sglang.py"

SGLANG = [
    Mutant(
        name="leave a tensor unaligned in SGLang's bucket",
        file="streaming/sglang_buckets.py",
        old="group = sorted(group, key=lambda item: -item[1].dtype.itemsize)",
        new="pass",
        test=f"{TESTS}::test_unaligned_sizes_arrive_with_every_byte",
    ),
    Mutant(
        name="name SGLang's version before the session is closed",
        file=SINK,
        old="            self._control.name_version(self._mark)\n\n    def _unfinished",
        new="            self._control.name_version(str(upload.version))\n\n    def _unfinished",
        test=f"{TESTS}::test_the_order_of_the_requests",
    ),
    Mutant(
        name="let SGLang answer with half of a model",
        file=SINK,
        old="            if self._begun:\n",
        new="            if False:\n",
        test=f"{FAILURES}::test_a_sender_that_fails_leaves_no_version_and_the_next_push_works",
    ),
    Mutant(
        name="forget that SGLang has half of a model",
        file=SINK,
        old="self._begun = version.startswith(INCOMPLETE)",
        new="pass",
        test=f"{FAILURES}::test_a_failed_server_that_refuses_the_next_push_stays_paused",
    ),
    Mutant(
        name="push into SGLang during the push of another trainer",
        file=SINK,
        old="if version.startswith(INCOMPLETE) and version != self._mark and not self.options.take_over:",
        new="if False:",
        test=f"{FAILURES}::test_a_second_push_is_refused_and_the_first_completes",
    ),
    Mutant(
        name="overlook an update that SGLang has not loaded",
        file=SINK,
        old='            self._wait()\n        with self._timed("send"):',
        new='            pass\n        with self._timed("send"):',
        test=f"{FAILURES}::test_one_update_that_was_not_loaded_is_not_overlooked",
    ),
    Mutant(
        name="listen on all addresses for SGLang's ranks",
        file="streaming/sglang_transport.py",
        old="options._devices = [dist.ProcessGroupGloo.create_device(hostname=listen)]",
        new="options._devices = [dist.ProcessGroupGloo.create_device(hostname='0.0.0.0')]",
        test=f"{TESTS}::test_a_push_listens_on_one_address",
    ),
    Mutant(
        name="give SGLang's ranks one pickle",
        file="streaming/sglang_transport.py",
        old="pickles = [pickled(bucket, buffer) for _ in range(self._workers)]",
        new="pickles = [pickled(bucket, buffer)]",
        test=f"{TESTS}::test_pickles_hold_the_same_tensors",
    ),
    Mutant(
        name="send FP8 to an SGLang that cannot load it again",
        file=SINK,
        old="            if upload.fp8 is not None:\n",
        new="            if False:\n",
        test=f"{FAILURES}::test_a_version_without_sessions",
    ),
    Mutant(
        name="free a bucket that SGLang maps",
        file="streaming/sglang_transport.py",
        old="self._call, self._work, self._buffer, self._timeout = call, work, buffer, timeout",
        new="self._call, self._work, self._buffer, self._timeout = call, work, None, timeout",
        test=f"{TESTS}::test_the_trainer_holds_two_buckets",
    ),
]
