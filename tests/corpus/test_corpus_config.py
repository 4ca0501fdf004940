"""Class: adapter configs that are no JSON, no LoRA, or no plain LoRA."""

import pytest
from corpus_cases import (
    CONFIG,
    SECRET,
    accepted,
    configured,
    every,
    hold,
    key,
    refused,
    tensors,
    told,
    with_bytes,
)


def text(word: str, content: bytes):
    return refused(word, with_bytes(CONFIG, content), CONFIG)


FILES = {
    "cfg_empty": text("line 1: not JSON", b""),
    "cfg_list": text("a list but a JSON object", b"[]"),
    "cfg_utf16": text("not UTF-8 JSON", "{}".encode("utf-16")),
    "cfg_nan": text("NaN but a finite number", b'{"lora_alpha": NaN}'),
    "cfg_infinity": text("1e999 but a finite number", b'{"lora_alpha": 1e999}'),
    "cfg_digits": text("not UTF-8 JSON", b'{"r": ' + b"9" * 5000 + b"}"),
    "cfg_duplicate_r": text("'r': given twice", b'{"r": 2, "r": 4}'),
    "cfg_deep": text("nested too deeply", b"[" * 100_000),
    "cfg_8mb": text("bytes but at most 7000000", b'{"r": "' + b"x" * 8_000_000 + b'"}'),
    "cfg_is_a_secret": text("line 1: not JSON", f"root:x:0:{SECRET}".encode()),
}
TYPES = {
    "cfg_type_none": key("peft_type: null but LORA is expected", peft_type=...),
    "cfg_type_ia3": key('peft_type: "IA3" but LORA', peft_type="IA3"),
    "cfg_type_adalora": key('peft_type: "ADALORA" but LORA', peft_type="ADALORA"),
    "cfg_type_loha": key('peft_type: "LOHA" but LORA', peft_type="LOHA"),
    "cfg_type_evil": key('peft_type: "EVIL" but LORA', peft_type="EVIL"),
    "cfg_type_list": key('peft_type: ["LORA"] but text', peft_type=["LORA"]),
    "cfg_task": key('task_type: "COOKING" but one of', task_type="COOKING"),
}
NUMBERS = {
    "cfg_r_negative": key("r: -1 but a positive integer", r=-1),
    "cfg_r_zero": key("r: 0 but a positive integer", r=0),
    "cfg_r_text": key('r: "2" but a positive integer', r="2"),
    "cfg_r_float": key("r: 4.5 but a positive integer", r=4.5),
    "cfg_r_true": key("r: true but a positive integer", r=True),
    "cfg_r_null": key("r: null but a positive integer", r=None),
    "cfg_r_8_is_2": tensors("rank 2 but r or rank_pattern say 8", r=8),
    "cfg_r_1e9": tensors("rank 2 but r or rank_pattern say 1000000000", r=10**9),
    "cfg_alpha_text": key('lora_alpha: "16" but a finite number', lora_alpha="16"),
    "cfg_alpha_true": key("lora_alpha: true but a finite number", lora_alpha=True),
    "cfg_alpha_enormous": key("but a finite number is expected", lora_alpha=10**400),
    "cfg_alpha_negative": told("lora_alpha: -4, so the change is subtracted", lora_alpha=-4),
    "cfg_alpha_zero": told("lora_alpha: 0, so the adapter changes nothing", lora_alpha=0),
    "cfg_alpha_missing": told("PEFT's default 8", lora_alpha=...),
    "cfg_rslora_text": key('use_rslora: "yes" but true or false', use_rslora="yes"),
}
NOT_PLAIN = {
    "cfg_dora": key("use_dora: true but nothing is expected: DoRA", use_dora=True),
    "cfg_lora_bias": key("lora_bias: true but nothing", lora_bias=True),
    "cfg_bias_all": key('bias: "all" but none is expected', bias="all"),
    "cfg_bias_maybe": key('bias: "maybe" but none is expected', bias="maybe"),
    "cfg_pissa": key("Convert it with PEFT", init_lora_weights="pissa"),
    "cfg_pissa_iterations": key("Convert it with PEFT", init_lora_weights="pissa_niter_4"),
    "cfg_olora": key("Convert it with PEFT", init_lora_weights="OLoRA"),
    "cfg_corda": key("Convert it with PEFT", init_lora_weights="corda"),
    "cfg_loftq": key("Convert it with PEFT", init_lora_weights="loftq"),
    "cfg_lora_ga": key("Convert it with PEFT", init_lora_weights="lora_ga"),
    "cfg_unknown_init": key("one of gaussian, eva", init_lora_weights="magic"),
    "cfg_trainable_tokens": key("rows of an embedding", trainable_token_indices=[1]),
    "cfg_layer_replication": key("another model than the base", layer_replication=[[0, 2]]),
    "cfg_qalora": key("QA-LoRA", use_qalora=True),
    "cfg_alora": key("some tokens only", alora_invocation_tokens=[1]),
    "cfg_arrow": key("Arrow routes", arrow_config={"top_k": 1}),
    "cfg_bdlora": key("block-diagonal", use_bdlora={"nblocks": 2}),
    "cfg_kasa": key("KaSA", kasa_config={"a": 1}),
    "cfg_monteclora": key("MonteCLoRA", monteclora_config={"a": 1}),
    "cfg_megatron": key("Megatron", megatron_config={"a": 1}),
    "cfg_weight_tying": key("shares factors between layers", ensure_weight_tying=True),
    "cfg_unknown_key": key("use_new_idea: 1 but nothing is expected", use_new_idea=1),
    "cfg_remote_code": key("its meaning is not known here", trust_remote_code=True),
    "cfg_modules_to_save": key("Whole layers are not merged", modules_to_save=["head"]),
}
BASES = {
    "cfg_base_differs": tensors("but one base", base_model_name_or_path="other/base"),
    "cfg_base_null": told("no base model named", base_model_name_or_path=None),
    "cfg_revision": told("no branch, tag or commit", revision="../../etc"),
    "cfg_fan_in_fan_out": told("seems to be a plain linear layer", fan_in_fan_out=True),
    "cfg_layers_to_transform": told("the tensors decide", layers_to_transform=[0, 1, 2, 3]),
    "cfg_target_parameters": told("has no tensors", target_parameters=["experts.down"]),
    "cfg_auto_mapping": told(
        "imported", auto_mapping={"parent_library": "evil", "base_model_class": "X"}
    ),
}
ODD = {
    "ok_old_config": accepted(configured(bias="none", lora_dropout=0.1, task_type=None)),
    "ok_older_config": accepted(configured(merge_weights=False, enable_lora=None)),
    "ok_future_null": accepted(configured(use_something_new=None, something_else={})),
    "ok_rslora": accepted(configured(use_rslora=True)),
    "ok_gaussian": accepted(configured(init_lora_weights="gaussian")),
    "ok_alpha_float": accepted(configured(lora_alpha=2.5)),
    "ok_transformers_mapping": accepted(
        configured(
            auto_mapping={
                "base_model_class": "BertModel",
                "parent_library": "transformers.models.bert.modeling_bert",
            }
        )
    ),
}
CASES = {**FILES, **TYPES, **NUMBERS, **NOT_PLAIN, **BASES, **ODD}


@pytest.mark.timeout(60)
@every(CASES)
def test_config(case, tmp_path):
    hold(case, tmp_path)
