"""Dictionaries as the neighbours themselves write, read and compute them; runs in .venv-peers.

`write FOLDER` makes a folder for each class of each neighbour, saved by its own code, with inputs and what it computes.
`read FOLDER` loads every dictionary that is below FOLDER, and adds what the neighbour computes from the inputs beside it.
Files of the default tests were made by `.venv-peers/bin/python benchmarks/peers/interchange.py write tests/interchange_files`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import dictionary_learning
import matplotlib.pyplot
import sae_lens
import sparsify
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from sae_lens.saes import (
    batchtopk_sae,
    gated_sae,
    jumprelu_sae,
    matching_pursuit_sae,
    matryoshka_batchtopk_sae,
    standard_sae,
    topk_sae,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

# overcomplete asks for these when imported, for images: a name of torchvision, and one that matplotlib no longer has.
sys.modules["torchvision"] = ModuleType("torchvision")
sys.modules["torchvision"].transforms = ModuleType("transforms")  # pyright: ignore[reportAttributeAccessIssue]
if not hasattr(matplotlib.pyplot.cm, "get_cmap"):
    matplotlib.pyplot.cm.get_cmap = matplotlib.pyplot.get_cmap

from overcomplete.sae import JumpSAE, RAJumpSAE, RATopKSAE, TopKSAE  # (after the lines above)

WIDTH, SIZE, K, TOKENS = 8, 24, 4, 32
COMPUTED = "computed.safetensors"
"""Inputs `x`, dense `codes` and the reconstruction `y`."""
VERSIONS = {
    "saelens": ("sae-lens", version("sae-lens")),
    "sparsify": ("eai-sparsify", version("eai-sparsify")),
    "dictionary-learning": ("dictionary-learning", version("dictionary-learning")),
    "overcomplete": ("Overcomplete", version("Overcomplete")),
}
"""The package and version of each neighbour, by the name of its format."""
Computes = Callable[[Tensor], tuple[Tensor, Tensor]]


def scramble(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter values that differ, so that no bias is zero and no row is another's copy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.abs() * 0.3 if "threshold" in name else noise * (1.0 if parameter.ndim == 2 else 0.3))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.5


def keep(folder: Path, computes: Computes, **notes: object) -> None:
    """Store what a neighbour computes from inputs, and which k the files alone do not tell."""
    x = inputs()
    with torch.no_grad():
        codes, y = computes(x)
    save_file({"x": x, "codes": codes.contiguous(), "y": y.contiguous()}, folder / COMPUTED)
    (folder / "case.json").write_text(json.dumps(notes) + "\n")


def of_saelens(folder: Path) -> Computes:
    sae = sae_lens.SAE.load_from_disk(folder)
    return lambda x: (sae.encode(x), sae.decode(sae.encode(x)))


def write_saelens(root: Path) -> None:
    common = {"d_in": WIDTH, "d_sae": SIZE, "device": "cpu"}
    made = {
        "topk": topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**common, k=K)),
        "topk-rescaled": topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True)),
        "topk-uncentred": topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**common, k=K, apply_b_dec_to_input=False)),
        "topk-bf16": topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**common, k=K)),
        "jumprelu": jumprelu_sae.JumpReLUSAE(jumprelu_sae.JumpReLUSAEConfig(**common)),
        "standard": standard_sae.StandardSAE(standard_sae.StandardSAEConfig(**common)),
        "gated": gated_sae.GatedSAE(gated_sae.GatedSAEConfig(**common)),
    }
    for name, sae in made.items():
        folder = root / f"saelens-{name}"
        scramble(sae, len(name))
        if name == "topk-bf16":
            for parameter in sae.parameters():
                parameter.data = parameter.data.bfloat16().float()
        sae.save_model(folder)
        if name == "topk-bf16":  # as a file of bf16 that is computed with in float32
            weights = load_file(folder / "sae_weights.safetensors")
            save_file({key: tensor.bfloat16() for key, tensor in weights.items()}, folder / "sae_weights.safetensors")
        keep(folder, of_saelens(folder), format="saelens")
    pursuit = matching_pursuit_sae.MatchingPursuitSAEConfig(
        **common, max_iterations=K, residual_threshold=0.0, stop_on_duplicate_support=False
    )
    sae = matching_pursuit_sae.MatchingPursuitSAE(pursuit)
    scramble(sae, 5)
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.save_model(root / "saelens-matching-pursuit")
    keep(root / "saelens-matching-pursuit", of_saelens(root / "saelens-matching-pursuit"), format="saelens")
    training = {
        "batchtopk": batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(**common, k=K)),
        "matryoshka": matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE(
            matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig(**common, k=K, matryoshka_widths=[8, SIZE])
        ),
    }
    for name, sae in training.items():
        folder = root / f"saelens-{name}"
        scramble(sae, 7)
        sae.topk_threshold.fill_(2.5)
        sae.save_inference_model(folder)
        keep(folder, of_saelens(folder), format="saelens")

    folder = root / "saelens-5-topk"
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(root / "saelens-topk" / "sae_weights.safetensors")
    save_file(weights, folder / "sae_weights.safetensors")
    names = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "hook_name": "blocks.0.hook_resid_post"}
    sizes = {"d_in": WIDTH, "d_sae": SIZE, "dtype": "float32", "device": "cpu", "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", **names, **sizes}))
    keep(folder, of_saelens(folder), format="saelens")


def of_sparsify(folder: Path) -> Computes:
    coder = sparsify.SparseCoder.load_from_disk(folder)

    def computes(x: Tensor) -> tuple[Tensor, Tensor]:
        out = coder.encode(x)
        codes = torch.zeros(len(x), coder.num_latents).scatter_(1, out.top_indices, out.top_acts)
        return codes, coder.decode(out.top_acts, out.top_indices)

    return computes


def write_sparsify(root: Path) -> None:
    coder = sparsify.SparseCoder(WIDTH, sparsify.SparseCoderConfig(num_latents=SIZE, k=K))
    scramble(coder, 1)
    coder.save_to_disk(root / "sparsify-topk")
    keep(root / "sparsify-topk", of_sparsify(root / "sparsify-topk"), format="sparsify")


def of_dictionary_learning(folder: Path) -> Computes:
    dictionary, _ = load_dictionary(str(folder), "cpu")
    return lambda x: (dictionary.encode(x), dictionary.decode(dictionary.encode(x)))


def write_dictionary_learning(root: Path) -> None:
    made = {
        "AutoEncoder": dictionary_learning.AutoEncoder(WIDTH, SIZE),
        "AutoEncoderNew": dictionary_learning.dictionary.AutoEncoderNew(WIDTH, SIZE),
        "GatedAutoEncoder": dictionary_learning.GatedAutoEncoder(WIDTH, SIZE),
        "JumpReluAutoEncoder": dictionary_learning.JumpReluAutoEncoder(WIDTH, SIZE),
        "AutoEncoderTopK": AutoEncoderTopK(WIDTH, SIZE, K),
        "BatchTopKSAE": BatchTopKSAE(WIDTH, SIZE, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(WIDTH, SIZE, K, [8, SIZE - 8]),
    }
    for name, dictionary in made.items():
        folder = root / f"dictionary-learning-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        scramble(dictionary, len(name))
        if hasattr(dictionary, "k"):
            dictionary.threshold.fill_(2.0)
        torch.save({key: tensor.clone() for key, tensor in dictionary.state_dict().items()}, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": K}, "buffer": {}}))
        keep(folder, of_dictionary_learning(folder), format="dictionary-learning")


def of_overcomplete(folder: Path, k: int) -> Computes:
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    size, width = state["encoder.final_block.0.weight"].shape
    if "dictionary.C" in state:
        points = state["dictionary.C"]
        sae = RAJumpSAE(width, size, points) if "thresholds" in state else RATopKSAE(width, size, points, top_k=k)
    else:
        sae = JumpSAE(width, size) if "thresholds" in state else TopKSAE(width, size, top_k=k)
    sae.load_state_dict(state)
    sae.eval()
    return lambda x: (sae.encode(x)[1], sae.decode(sae.encode(x)[1]))


def write_overcomplete(root: Path) -> None:
    points = torch.randn(2 * SIZE, WIDTH, generator=torch.Generator().manual_seed(3))
    made = {"TopKSAE": TopKSAE(WIDTH, SIZE, top_k=K), "JumpSAE": JumpSAE(WIDTH, SIZE)}
    made |= {"RATopKSAE": RATopKSAE(WIDTH, SIZE, points, top_k=K), "RAJumpSAE": RAJumpSAE(WIDTH, SIZE, points)}
    for name, sae in made.items():
        folder = root / f"overcomplete-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        scramble(sae, len(name))
        sae.eval()  # an archetypal dictionary is brought into its bounds by this
        torch.save({key: tensor.clone() for key, tensor in sae.state_dict().items()}, folder / "state_dict.pt")
        keep(folder, of_overcomplete(folder, K), format="overcomplete", **({"k": K} if name.endswith("TopKSAE") else {}))


def read(root: Path) -> Iterator[str]:
    """Compute with every dictionary below `root` whose `case.json` names the format and k."""
    for path in sorted(root.rglob("case.json")):
        case, folder = json.loads(path.read_text()), path.parent
        loaders = {"saelens": of_saelens, "sparsify": of_sparsify, "dictionary-learning": of_dictionary_learning}
        format = case["format"]
        computes = of_overcomplete(folder, case["k"]) if format == "overcomplete" else loaders[format](folder)
        x = load_file(path.with_name("x.safetensors"))["x"]
        with torch.no_grad():
            codes, y = computes(x)
        save_file({"x": x, "codes": codes.contiguous(), "y": y.contiguous()}, folder / COMPUTED)
        yield folder.name


def main(verb: str, root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if verb == "write":
        torch.manual_seed(0)
        for writes in (write_saelens, write_sparsify, write_dictionary_learning, write_overcomplete):
            writes(root)
        (root / "versions.json").write_text(json.dumps(VERSIONS, indent=1) + "\n")
    else:
        print(*read(root), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
