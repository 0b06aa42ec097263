"""Faults of the families: their layouts, and the models that are built of them."""

from __future__ import annotations

from faults.mutant import Mutant

MEGATRON = "tests/checkpoint/test_through_megatron.py"
CONVERT = "tests/checkpoint/test_convert.py"
FAMILIES = "tests/checkpoint/test_families.py"
THROUGH = "tests/checkpoint/test_families_through_megatron.py"
ROTARY = "tests/weights/test_rotary.py"
LOADS = "tests/checkpoint/test_parallel_loads.py::test_every_byte_reaches_every_rank_and_comes_back"

MODELS = [
    Mutant(
        name="swap beta and alpha",
        file="weights/blocks.py",
        old='for name in ("beta", "alpha")]',
        new='for name in ("alpha", "beta")]',
        test=f"{THROUGH}::TestParity::test_one_rank",
    ),
    Mutant(
        name="swap gate and up",
        file="weights/blocks.py",
        old='[(f"{source}gate_proj.weight", ffn), (f"{source}up_proj.weight", ffn)]',
        new='[(f"{source}up_proj.weight", ffn), (f"{source}gate_proj.weight", ffn)]',
        test=f"{MEGATRON}::TestParity::test_one_rank",
    ),
    Mutant(
        name="scale the probability of one expert by itself",
        file="models/provider.py",
        old="    config.moe_router_pre_softmax = False\n",
        new="",
        test=f"{THROUGH}::TestParity::test_a_router_that_chooses_one_expert",
    ),
    Mutant(
        name="take transposed experts for others",
        file="weights/naming.py",
        old="return len(gate_up) == len(down) == 3 and",
        new="return False and",
        test=f"{FAMILIES}::test_every_byte_comes_back",
    ),
    Mutant(
        name="ignore the exact originals",
        file="weights/mapping.py",
        old='return self.rule != "minus_one"',
        new="return True",
        test=f"{CONVERT}::TestRoundTrip",
    ),
    Mutant(
        name="swap the embedding's norm and the hidden state's in front of the MTP layer",
        file="weights/blocks.py",
        old='yield rename(f"{MTP}pre_fc_norm_embedding.weight", f"{megatron}enorm.weight", (hidden,))\n'
        '    yield rename(f"{MTP}pre_fc_norm_hidden.weight", f"{megatron}hnorm.weight", (hidden,))',
        new='yield rename(f"{MTP}pre_fc_norm_embedding.weight", f"{megatron}hnorm.weight", (hidden,))\n'
        '    yield rename(f"{MTP}pre_fc_norm_hidden.weight", f"{megatron}enorm.weight", (hidden,))',
        test=f"{THROUGH}::TestMultiTokenPrediction",
    ),
    Mutant(
        name="take q, k and v as they come instead of by group",
        file="weights/blocks.py",
        old="yield concat_rows(rows, qkv, (hidden,), groups=groups)",
        new="yield concat_rows(rows, qkv, (hidden,))",
        test=f"{THROUGH}::TestParity",
    ),
    Mutant(
        name="take q, k, v and z as they come instead of by key head",
        file="weights/blocks.py",
        old='yield split_rows(f"{source}in_proj_qkvz.weight", qkvz, row, groups=groups)',
        new='yield split_rows(f"{source}in_proj_qkvz.weight", qkvz, row)',
        test=f"{THROUGH}::TestParity",
    ),
    Mutant(
        name="normalize probabilities of experts that are not",
        file="models/provider.py",
        old='"moe_router_pre_softmax": not model.norm_topk_prob,',
        new='"moe_router_pre_softmax": False,',
        test=f"{THROUGH}::TestParity",
    ),
    Mutant(
        name="scale Llama's frequencies by megatron-core's own numbers",
        file="models/provider.py",
        old="rope._apply_scaling(rope.inv_freq, **dataclasses.asdict(model.rope_scaling))",
        new="rope._apply_scaling(rope.inv_freq, factor=model.rope_scaling.factor)",
        test=f"{THROUGH}::TestParity",
    ),
    Mutant(
        name="give every pipeline stage the first layers",
        file="models/specs.py",
        old="for kind in kinds[start : start + count]]",
        new="for kind in kinds[:count]]",
        test=f"{LOADS}[PP2-Qwen3-MoE-a-dense-layer]",
    ),
    Mutant(
        name="leave a tied head a weight of its own beside MTP",
        file="models/provider.py",
        old="        model.output_layer.weight = None\n",
        new="        pass\n",
        test=f"{LOADS}[PP2-Qwen3.5-tied-MTP]",
    ),
    Mutant(
        name="build MTP like the last layer of its stage",
        file="models/specs.py",
        old="(layer,) = decoder_block_spec(_one_attention_layer(config), pp_rank=0).layer_specs",
        new="layer = decoder_block_spec(config, vp_stage=vp_stage).layer_specs[-1]",
        test="tests/models/test_provider.py"
        "::test_under_transformer_engine_mtp_has_attention_and_experts_whatever_the_layers_of_its_stage",
    ),
    Mutant(
        name="let rope_parameters win over rope_scaling",
        file="weights/hf_config/rotary.py",
        old='chosen = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"',
        new='chosen = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"',
        test=f"{ROTARY}::test_what_no_model_of_transformers_has_is_refused",
    ),
    Mutant(
        name="let a rope_theta beside the parameters win over the one in them",
        file="weights/hf_config/rotary.py",
        old='rope.setdefault("rope_theta", text["rope_theta"])',
        new='rope["rope_theta"] = text["rope_theta"]',
        test=f"{ROTARY}::test_the_frequencies_are_those_of_transformers",
    ),
    Mutant(
        name="tie by the text model's config",
        file="weights/hf_config/decoder.py",
        old='"tie_word_embeddings": config.get("tie_word_embeddings", False)',
        new='"tie_word_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))',
        test=f"{ROTARY}::test_the_outer_config_ties_and_the_text_config_rotates",
    ),
    Mutant(
        name="take heads that their groups do not divide",
        file="weights/hf_config/sizes.py",
        old="is_right = values[1] < 1 or values[0] % values[1] == 0",
        new="is_right = True",
        test="tests/weights/test_families.py::test_sizes_that_no_model_has_are_refused",
    ),
    Mutant(
        name="cut the fraction off a rotary base",
        file="weights/hf_config/decoder.py",
        old="if not float(self.rope_theta).is_integer():",
        new="if False:",
        test="tests/models/test_provider.py::test_a_rotary_base_with_a_fraction_has_no_flag",
    ),
]
