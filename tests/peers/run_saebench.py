"""SAEBench's core evaluation on folders, in an environment of its own (numpy below 2); test_saebench.py runs it.

    PYTHON run_saebench.py MODEL_DIR OUT.json TOKENS_DIR... -- SAE_DIR...

Each dictionary is read by SAELens's `SAE.load_from_disk` and goes through SAEBench's `multiple_evals` with every
metric on: its reading of the dictionary's facts, its activations store, its metrics, its result file. One thing only
stands in for what needs the hub: TransformerLens loads models by the hub's names, so the model that it is asked for
is made from MODEL_DIR, without processing. A TOKENS_DIR holds parquet with a column `tokens`, all of it one batch; it
is written A/B, seen from here, because SAELens takes it for a name of the hub when it looks for the tokenizer's.
OUT.json gets what the result files hold, by tokens and dictionary.
"""

import json
import sys
import tempfile
from pathlib import Path

import pyarrow.dataset
import torch
from sae_bench.evals.core.main import multiple_evals
from sae_lens import SAE
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading
from transformers import AutoModelForCausalLM, AutoTokenizer


def hooked(folder):
    """What `HookedTransformer.from_pretrained_no_processing` gives, without the hub's name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cfg = loading.get_pretrained_model_config(
        folder, hf_cfg=model.config.to_dict(), fold_ln=False, device="cpu", dtype=torch.float32
    )
    cfg.tokenizer_name = None
    lens = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder), move_to_device=False)
    state = loading.get_pretrained_state_dict(folder, cfg, model, dtype=torch.float32)
    flags = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    lens.load_and_process_state_dict(state, **dict.fromkeys(flags, False))
    return lens.eval()


def asked(name, **_):
    """In place of a look-up in TransformerLens's list of names."""
    return hooked(name)


def evaluated(dictionaries, tokens):
    rows = pyarrow.dataset.dataset(tokens, format="parquet").to_table().column("tokens")
    named = [(Path(folder).name, SAE.load_from_disk(folder, device="cpu")) for folder in dictionaries]
    with tempfile.TemporaryDirectory() as out:
        results = multiple_evals(
            named, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1,
            eval_batch_size_prompts=len(rows), compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True, dataset=tokens, context_size=len(rows[0]),
            output_folder=out, device="cpu",
        )  # fmt: skip
        assert len(results) == len(named), "SAEBench went on after an error: see its log above"
        files = [json.loads(path.read_text()) for path in Path(out).glob("*.json")]
    return {facts["sae_lens_release_id"]: facts for facts in files}


if __name__ == "__main__":
    between = sys.argv.index("--")
    sys.argv, dictionaries = sys.argv[:between], sys.argv[between + 1 :]
    _, model, out, *several = sys.argv
    HookedTransformer.from_pretrained_no_processing = asked
    Path(out).write_text(json.dumps({Path(tokens).name: evaluated(dictionaries, tokens) for tokens in several}))
