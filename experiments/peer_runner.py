"""How fast SAELens goes from tokens to a dictionary: its own training runner, with the language model in the loop.

    .venv-peers/bin/python experiments/peer_runner.py MODEL_DIR TOKENS.npy OUT --layer 8 --latents 4608 --k 32 ...

MODEL_DIR is a Hugging Face folder, TOKENS.npy int32 `[n, seq]`. TopK with AuxK as SAELens has it by default, at the
output of one block, on the CPU, without evaluations, checkpoints or W&B. The model is transformers' own (attention
by PyTorch's fused kernel), which SAELens wraps, or with `--way tlens` TransformerLens's without processing; neither
computes blocks after the point. Prints one JSON line: the seconds of `run()`, also those that the processors worked
(which other programs change less), training tokens per second, how many tokens the model read for them (half of the
buffer is never trained on: 8,192 with the defaults), and the dictionary's L0 as a sign of life. Loading is not counted.
SAELens calls a latent dead after 1,000 steps: in a shorter run AuxK has nothing to do.
"""

import argparse
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np


def of_transformers(folder: Path, layer: int, seq: int) -> tuple[Any, str]:
    """SAELens's wrapper of the transformers model, and the name of the point in it."""
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    name = f"model.layers.{layer}"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False  # keys and values would be kept for nothing
    return import_module("sae_lens.load_model").HookedProxyLM(model, None, hook_names=[name]), name


def of_tlens(folder: Path, layer: int, seq: int) -> tuple[Any, str]:
    """What `HookedTransformer.from_pretrained_no_processing` gives, which takes names of the hub only."""
    torch: Any = import_module("torch")
    lens: Any = import_module("transformer_lens")
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    facts = model.config.to_dict()
    loading = lens.loading_from_pretrained
    # Its mask is [context, context] bytes in every block: 2 GB for SmolLM2's 8,192.
    cfg = loading.get_pretrained_model_config(
        str(folder), hf_cfg=facts, device="cpu", dtype=torch.float32, n_ctx=seq, fold_ln=False
    )
    cfg.tokenizer_name = None
    hooked = lens.HookedTransformer(cfg, tokenizer=None, move_to_device=False)
    state = loading.get_pretrained_state_dict(str(folder), cfg, model, dtype=torch.float32)
    raw = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    hooked.load_and_process_state_dict(state, **dict.fromkeys(raw, False))
    return hooked.eval(), f"blocks.{layer}.hook_resid_post"


WAYS = {"transformers": of_transformers, "tlens": of_tlens}


def runner(given: argparse.Namespace) -> Any:
    """SAELens's runner with our model and tokens in place of the hub's."""
    lens: Any = import_module("sae_lens")
    config: Any = import_module("sae_lens.config")
    topk: Any = import_module("sae_lens.saes.topk_sae")
    ids = np.load(given.tokens_file)
    seq = ids.shape[1]
    model, hook = WAYS[given.way](given.model, given.layer, seq)
    width = json.loads((given.model / "config.json").read_text())["hidden_size"]
    facts = config.LanguageModelSAERunnerConfig(
        sae=topk.TopKTrainingSAEConfig(d_in=width, d_sae=given.latents, k=given.k),
        model_name=str(given.model), hook_name=hook, dataset_path=str(given.tokens_file), is_dataset_tokenized=True,
        streaming=False, context_size=seq, prepend_bos=False, training_tokens=given.tokens,
        train_batch_size_tokens=given.batch, store_batch_size_prompts=max(given.forward // seq, 1),
        n_batches_in_buffer=-(-given.buffer * given.batch // seq), lr=1e-3, device="cpu", seed=0,
        n_checkpoints=0, checkpoint_path=None, output_path=str(given.out), verbose=False,
        logger=config.LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    rows = import_module("datasets").Dataset.from_dict({"tokens": ids.tolist()})
    return lens.LanguageModelSAETrainingRunner(facts, override_dataset=rows, override_model=model)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model", type=Path, metavar="MODEL_DIR")
    asked.add_argument("tokens_file", type=Path, metavar="TOKENS.npy")
    asked.add_argument("out", type=Path, metavar="OUT")
    asked.add_argument("--way", choices=WAYS, default="transformers")
    asked.add_argument("--layer", type=int, default=8)
    asked.add_argument("--latents", type=int, default=4608)
    asked.add_argument("--k", type=int, default=32)
    asked.add_argument("--tokens", type=int, default=131_072, help="to train on; the file is begun again at its end")
    asked.add_argument("--batch", type=int, default=2048, help="tokens in a step")
    asked.add_argument("--forward", type=int, default=2048, help="tokens in a forward pass of the model")
    asked.add_argument("--buffer", type=int, default=8, help="batches that are held and mixed")
    given = asked.parse_args()
    import_module("torch").manual_seed(0)
    import_module("torch._dynamo")  # the first optimizer imports it, which takes ten seconds
    run = runner(given)
    began, worked = time.perf_counter(), time.process_time()
    sae = run.run()
    took, worked = time.perf_counter() - began, time.process_time() - worked
    store = run.activations_store
    facts = {
        "seconds": round(took, 2),
        "cpu_seconds": round(worked, 2),
        "tokens_per_s": round(given.tokens / took, 1),
        "tokens": given.tokens,
        "model_tokens": (store.n_dataset_processed + 1) * store.context_size,  # counted when the next is asked for
        "l0": round(float(sae.cfg.metadata.l0), 3),
        "way": given.way,
        "sae_lens": import_module("sae_lens").__version__,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
