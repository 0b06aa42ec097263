"""Faults of the conversions and of what compares their results."""

from __future__ import annotations

from faults.mutant import Mutant

MEGATRON = "tests/checkpoint/test_through_megatron.py"
CONVERT = "tests/checkpoint/test_convert.py"
FP8_FILES = "tests/weights/test_fp8.py"
FAMILIES = "tests/checkpoint/test_families.py"
VOCABULARY = "tests/checkpoint/test_vocabulary.py"
RELEASED = "tests/checkpoint/test_released_sources.py"
DTYPES = "tests/checkpoint/formats/test_dtypes.py"
EXPERTS = "tests/checkpoint/compare/test_verify_experts.py"
MID = "tests/checkpoint/test_mid_training.py::test_the_model_is_found_among_the_states_of_two_optimizers"

CHECKPOINTS = [
    Mutant(
        name="believe the disk",
        file="checkpoint/formats/digests.py",
        old="if found != expected:",
        new="if False:",
        test=f"{CONVERT}::TestVerification",
    ),
    Mutant(
        name="do not wait for what is read back",
        file="checkpoint/jobs/read_back.py",
        old="future.result()",
        new="pass",
        test="tests/checkpoint/jobs/test_read_back.py",
    ),
    Mutant(
        name="cast in the converter",
        file="checkpoint/jobs/import_job.py",
        old="return mapping.to_megatron(tensors)",
        new="return tuple(t.bfloat16() for t in mapping.to_megatron(tensors))",
        test=f"{CONVERT}::TestRoundTrip",
    ),
    Mutant(
        name="round what was trained in fp32",
        file="weights/restore.py",
        old="infos[name] = TensorInfo(dtype=torch.float32, shape=info.shape)",
        new="infos[name] = info",
        test=f"{MEGATRON}::TestTrained",
    ),
    Mutant(
        name="unpickle anything",
        file="checkpoint/formats/torch_dist_metadata.py",
        old="if name not in _ALLOWED.get(module, ()):",
        new="if False:",
        test="tests/checkpoint/formats/test_torch_dist_damage.py",
    ),
    Mutant(
        name="swap gate and up of an expert",
        file="weights/experts.py",
        old='[("gate_proj", 0, rows // 2), ("up_proj", rows // 2, rows)]',
        new='[("up_proj", 0, rows // 2), ("gate_proj", rows // 2, rows)]',
        test=f"{FP8_FILES}::TestFusedExperts",
    ),
    Mutant(
        name="note a part before it is verified",
        file="checkpoint/jobs/run.py",
        old="        record = job.run(part, path, tell)\n    staging.note(index, record)",
        new="        staging.note(index, {'chunks': [], 'digests': []})\n        job.run(part, path, tell)",
        test="tests/checkpoint/jobs/test_interrupted.py",
    ),
    Mutant(
        name="write to a part's own name",
        file="checkpoint/jobs/staging.py",
        old='path = target.with_name(f"{_UNFINISHED}{os.getpid()}-{target.name}")',
        new="path = target",
        test="tests/checkpoint/jobs/test_interrupted.py",
    ),
    Mutant(
        name="go on with the parts of another conversion",
        file="checkpoint/jobs/staging.py",
        old="elif path.read_bytes() != text.encode():",
        new="elif False:",
        test="tests/checkpoint/jobs/test_interrupted.py::TestStaging",
    ),
    Mutant(
        name="read all experts for each",
        file="checkpoint/jobs/import_job.py",
        old="tensors = [self.reader.read(spec.name, spec.index) for spec in mapping.hf]",
        new="tensors = [self.reader.read(spec.name)[spec.index] for spec in mapping.hf]",
        test=f"{FAMILIES}::TestExperts",
    ),
    Mutant(
        name="let the last expert decide on the dtype of all",
        file="weights/restore.py",
        old="infos.update({name: info for name, info in sources.items() if name not in widened})",
        new="infos.update(sources)",
        test=f"{FAMILIES}::TestExperts",
    ),
    Mutant(
        name="forget what the vision part was",
        file="checkpoint/sidecar.py",
        old="if digest(tensor) != self._sidecar.carried[name].digest:",
        new="if False:",
        test=f"{FAMILIES}::TestParts",
    ),
    Mutant(
        name="take -0.0 for 0.0 in a comparison",
        file="checkpoint/compare/difference.py",
        old="torch.equal(_bits(first), _bits(second))",
        new="torch.equal(first, second)",
        test="tests/checkpoint/compare/test_difference.py::test_the_sign_of_zero_is_a_difference_of_zero",
    ),
    Mutant(
        name="compare a norm with the undone change of its layout instead of its original",
        file="checkpoint/compare/verify.py",
        old="self._restorer.restore(mapping, originals=self._originals_of(mapping))",
        new="self._restorer.restore(mapping, originals={})",
        test="tests/checkpoint/compare/test_verify_two_kinds.py::TestSource",
    ),
    Mutant(
        name="forget the carried tensors in a comparison",
        file="checkpoint/compare/verify.py",
        old="for name in sorted(hf.keys() & carried.keys() - converted.keys()):",
        new="for name in sorted(set()):",
        test="tests/checkpoint/compare/test_verify_two_kinds.py::TestParts",
    ),
    Mutant(
        name="compare the first layer of a stack with every layer",
        file="checkpoint/compare/verify.py",
        old="read(n, (at, *index))",
        new="read(n, (0, *index))",
        test="tests/checkpoint/compare/test_verify.py::TestMegatron",
    ),
    Mutant(
        name="compare the first expert of a stack with every expert",
        file="checkpoint/compare/layouts.py",
        old="mapping.to_megatron([entry.read(source.index)])",
        new="mapping.to_megatron([entry.read((0,) * len(source.index))])",
        test=f"{EXPERTS}::TestExperts",
    ),
    Mutant(
        name="forget the experts that only the larger of two models has",
        file="checkpoint/compare/layouts.py",
        old="for spec in mapping.hf if spec.name in cut):",
        new="for spec in mapping.hf if False):",
        test=f"{EXPERTS}::TestExperts",
    ),
    Mutant(
        name="put a part of a tensor in the place of another tensor",
        file="checkpoint/compare/layouts.py",
        old=" and not any(spec.name in entries for other in finer for spec in other.hf)",
        new="",
        test=f"{EXPERTS}::TestExperts",
    ),
    Mutant(
        name="end with 0 although checkpoints differ",
        file="cli/verify.py",
        old="sys.exit(0 if agrees else 1)",
        new="sys.exit(0)",
        test="tests/cli/test_compare.py::TestVerify",
    ),
    Mutant(
        name="take an optimizer's tensors for the model's",
        file="checkpoint/formats/torch_dist.py",
        old='prefixes = ("optimizer.", "chained_",',
        new='prefixes = ("optimizer.",',
        test=MID,
    ),
    Mutant(
        name="take every row above the vocabulary for padding",
        file="weights/vocabulary.py",
        old="    if not len(found):",
        new="    if True:",
        test=f"{VOCABULARY}::TestExport::test_other_rows_are_counted {VOCABULARY}::TestVerify",
    ),
    Mutant(
        name="keep trained rows without telling config.json",
        file="checkpoint/jobs/export_job.py",
        old="        if self._options.vocab_size is not None:\n            write_config",
        new="        if False:\n            write_config",
        test=f"{VOCABULARY}::TestExport::test_a_larger_vocabulary_has_them",
    ),
    Mutant(
        name="call an export that cut trained rows a success",
        file="cli/export.py",
        old="if report.rounded or (report.cut_tokens and vocab_size is None):",
        new="if report.rounded:",
        test=f"{VOCABULARY}::TestExport::test_the_command_names_them_and_is_no_success",
    ),
    Mutant(
        name="take a head of its own for the tied embedding",
        file="weights/mapping.py",
        old="if not _same_bits(pieces.setdefault(place, rows), rows):",
        new="if pieces.setdefault(place, rows) is None:",
        test=f"{RELEASED}::TestATiedHeadThatIsStored",
    ),
    Mutant(
        name="drop a tied head that was stored",
        file="weights/blocks.py",
        old="if config.tie_word_embeddings and naming.head:",
        new="if False:",
        test=f"{RELEASED}::TestATiedHeadThatIsStored",
    ),
    Mutant(
        name="say nothing of stored frequencies that the config does not give",
        file="checkpoint/jobs/import_job.py",
        old="return torch.allclose(stored.double(), expected",
        new="return True or torch.allclose(stored.double(), expected",
        test=f"{RELEASED}::TestStoredFrequencies",
    ),
    Mutant(
        name="leave an adapter beside the full weights out without a word",
        file="checkpoint/identify.py",
        old="    found = adapter_files(hf_dir)\n",
        new="    found: list[str] = []\n",
        test=f"{RELEASED}::test_an_adapter_beside_full_weights_is_refused",
    ),
    Mutant(
        name="take unsigned integers for signed ones",
        file="checkpoint/compare/difference.py",
        old="differs |= values.view(torch.int64) < 0",
        new="pass",
        test=f"{DTYPES}::TestValues::test_unsigned_integers",
    ),
    Mutant(
        name="compare the real parts of complex values alone",
        file="checkpoint/compare/difference.py",
        old="return differs.any(dim=-1) if a.is_complex() else differs",
        new="return differs[..., 0] if a.is_complex() else differs",
        test=f"{DTYPES}::TestValues::test_complex_values",
    ),
    Mutant(
        name="take tokens that were added to the head alone for padding",
        file="weights/vocabulary.py",
        old="torch.equal(codes, codes[:1].expand_as(codes))",
        new="True",
        test=f"{VOCABULARY}::TestExport::test_padding_that_a_softmax_trained",
    ),
]
