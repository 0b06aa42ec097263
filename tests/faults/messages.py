"""Faults of messages, and of the checks of arguments."""

from __future__ import annotations

from faults.mutant import Mutant

MESSAGES = "tests/messages"
VALIDATION = "tests/test_validation.py"

ENTRANCES = [
    Mutant(
        name="take a Git LFS pointer for a file",
        file="checkpoint/formats/directory_checks.py",
        old="        return file.read(len(_POINTER)) == _POINTER",
        new="        return False",
        test=f"{MESSAGES}/test_inputs.py::TestGitLfs",
    ),
    Mutant(
        name="carry a Git LFS pointer as an asset",
        file="checkpoint/assets.py",
        old="    refuse_pointers(directory / place for place in places)\n",
        new="",
        test=f"{MESSAGES}/test_inputs.py::TestGitLfs",
    ),
    Mutant(
        name="say nothing of the checkpoints beside a tracker",
        file="checkpoint/formats/directory_checks.py",
        old='        return f"{tracker} names {named}, but {problem}; {complete_ones(path)}"',
        new='        return f"{tracker} names {named}, but {problem}"',
        test=f"{MESSAGES}/test_inputs.py::TestTracker",
    ),
    Mutant(
        name="suggest a checkpoint whose save was interrupted",
        file="checkpoint/formats/directory_checks.py",
        old='if (path / name / ".metadata").is_file()]',
        new="]",
        test=f"{MESSAGES}/test_inputs.py::TestTracker",
    ),
    Mutant(
        name="do not tell an export from an import",
        file="checkpoint/identify.py",
        old="    if found is None or found == expected:\n",
        new="    if True:\n",
        test=f"{MESSAGES}/test_inputs.py::TestWhatIsInTheDirectory",
    ),
    Mutant(
        name="say nothing of the Hub",
        file="checkpoint/formats/directory_checks.py",
        old="    if found is None or os.path.lexists(path):\n",
        new="    if True:\n",
        test=f"{MESSAGES}/test_inputs.py::TestHubId",
    ),
    Mutant(
        name="trust the shapes of the sidecar",
        file="checkpoint/jobs/export_job.py",
        old="        sidecar.check_shapes(self.plan.hf_shapes)\n",
        new="",
        test=f"{MESSAGES}/test_tensors.py::TestNames",
    ),
    Mutant(
        name="leave an error of the disk without a path",
        file="checkpoint/jobs/run.py",
        old="        if error.errno is None or error.filename is not None:\n",
        new="        if True:\n",
        test=f"{MESSAGES}/test_operating_system.py::TestOperatingSystem",
    ),
    Mutant(
        name="let Ctrl-C reach a worker that starts",
        file="checkpoint/jobs/run.py",
        old="    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n",
        new="    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())\n",
        test="tests/checkpoint/jobs/test_interrupted.py::TestWorkers::test_they_never_see_an_interruption",
    ),
    Mutant(
        name="end as an error after Ctrl-C",
        file="cli/terminal.py",
        old='    except KeyboardInterrupt:\n        click.echo(f"megatron-fp32: {_interrupted(output)}", err=True)\n',
        new='    except EOFError:\n        click.echo(f"megatron-fp32: {_interrupted(output)}", err=True)\n',
        test=f"{MESSAGES}/test_operating_system.py::TestInterruption",
    ),
    Mutant(
        name="take any word for what to do with vision",
        file="checkpoint/convert.py",
        old='    check_choice("vision", vision, get_args(Vision))\n',
        new="",
        test=VALIDATION,
    ),
    Mutant(
        name="take a size for a flag and a flag for a size",
        file="validation.py",
        old="if not isinstance(value, int) or isinstance(value, bool):",
        new="if not isinstance(value, int):",
        test=VALIDATION,
    ),
    Mutant(
        name="find out that a device is not there when half is written",
        file="checkpoint/quantize.py",
        old="    _check_device(device)\n",
        new="",
        test=VALIDATION,
    ),
    Mutant(
        name="take the truth of any flag",
        file="config.py",
        old='        check_flag("logits", self.logits)\n',
        new="",
        test=VALIDATION,
    ),
    Mutant(
        name="leave a missing megatron-core to Python",
        file="extras.py",
        old="        if package not in _REMEDIES:\n            raise\n",
        new="        if package:\n            raise\n",
        test=f"{MESSAGES}/test_missing_packages.py::TestMissingPackages",
    ),
    Mutant(
        name="take every missing module for megatron-core",
        file="extras.py",
        old='package = "megatron" if error.name == "megatron.core" else error.name',
        new='package = "megatron" if (error.name or "").startswith("megatron") else error.name',
        test=f"{MESSAGES}/test_missing_packages.py::TestMissingPackages",
    ),
]
