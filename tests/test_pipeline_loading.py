import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import difflex
from difflex.choices import Precision
from difflex.distributed import Ranks
from difflex.errors import BadInput, BrokenFile, MissingExtra, OutOfMemory, UnknownName
from difflex.pipeline import choose_precision, loading, shots_of_rank
from difflex.pipeline.components import PLANS, ComponentPlan, PipelinePlan, read_plan
from difflex.pipeline.families import family_of
from difflex.pipeline.loading import WeightPlacement, check_fits
from difflex.pipeline.sources import read_defaults
from difflex.pipeline.weights import count_weights
from difflex.testing import TINY, tiny_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning",
    "ignore:`torch.jit:DeprecationWarning",
)
PROMPTS = ["a red star", "a blue circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("flux", tmp_path_factory.mktemp("models") / "flux")


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_give_almost_the_same_activations(folder: Path, precision: str):
    exact, reduced = difflex.load(folder), difflex.load(folder, precision=precision)
    assert [next(pipe.shots("a star")).precision for pipe in (exact, reduced)] == ["fp32", precision]
    assert dtypes(reduced.engine.denoiser) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    a, b = (next(pipe.harvest(pipe.shots(PROMPTS, steps=1), "single.1", progress=False)).values for pipe in (exact, reduced))
    assert 0 < float((a - b.float()).norm() / a.norm()) < 0.05


def test_the_error_for_an_unknown_precision_lists_the_known_ones(folder: Path):
    with pytest.raises(UnknownName, match=r"int3.*bf16, fp16, fp32, nf4"):
        difflex.load(folder, precision="int3")


@pytest.mark.parametrize("family", ["flux", "sdxl", "pixart"])
def test_nf4_on_a_cpu_quantises_the_blocks_and_the_large_text_encoder(family: str, tmp_path: Path):
    folder = tiny_folder(family, tmp_path / family)
    exact, quantised = difflex.load(folder), difflex.load(folder, precision="nf4")
    kinds = {type(module).__name__ for module in quantised.engine.denoiser.modules()}
    assert "Linear4bit" in kinds
    large = quantised.diffusers.components.get(quantised.engine.family.large_text)
    assert large is None or any(type(module).__name__ == "Linear4bit" for module in large.modules())
    site = [row.site for row in exact.sites() if row.site.stream == "image"][-1]
    assert [row.site for row in quantised.sites()] == [row.site for row in exact.sites()]
    a, b = (
        next(pipe.harvest(pipe.shots(PROMPTS, steps=2, keep_steps=[0]), site, progress=False)).values
        for pipe in (exact, quantised)
    )
    assert 0.001 < float((a - b).norm() / a.norm()) < 0.5
    assert quantised.generate("a red star")[0].image.size == (32, 32)


def test_the_error_for_missing_bitsandbytes_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"difflex\[nf4\]"):
        difflex.load(folder, precision="nf4")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_missing_device_is_an_error(folder: Path, device: str):
    with pytest.raises(BadInput, match=rf"'{device}'.*cpu"):
        difflex.load(folder, device=device)


@pytest.mark.parametrize("name", ["folder", "mini-flux"])
def test_a_revision_of_a_local_model_is_an_error(folder: Path, name: str):
    with pytest.raises(BadInput, match=r"no revision main.*on the hub"):
        difflex.load(folder if name == "folder" else name, revision="main")


def test_offload_without_a_gpu_causes_a_warning(folder: Path):
    with pytest.warns(UserWarning, match="offload=True has no effect"):
        difflex.load(folder, device="cpu", offload=True)


@pytest.mark.parametrize("family", TINY)
def test_an_untrained_model_has_the_same_geometry_and_weights_from_its_seed(family: str, tmp_path: Path):
    folder = tiny_folder(family, tmp_path / family)
    trained, first, repeated, different = (difflex.load(folder, untrained=seed) for seed in (None, 3, 3, 4))
    shapes = [{name: p.shape for name, p in pipe.engine.denoiser.named_parameters()} for pipe in (trained, first)]
    assert shapes[0] == shapes[1]
    weights = [next(iter(pipe.engine.denoiser.parameters())) for pipe in (first, repeated, different)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.generate("a red star", steps=2)[0].image.size == (32, 32)
    assert [next(pipe.shots("a star")).revision for pipe in (trained, first, different)] == [None, "untrained-3", "untrained-4"]


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_only_the_denoiser_of_an_untrained_model_has_random_weights(folder: Path, precision: str):
    trained, control = (difflex.load(folder, precision=precision, untrained=seed) for seed in (None, 3))
    components = {name: component for name, component in trained.diffusers.components.items() if isinstance(component, nn.Module)}
    for name, component in components.items():
        state = control.diffusers.components[name].state_dict()
        same = all(torch.equal(weights, state[key]) for key, weights in component.state_dict().items())
        assert same == (name != "transformer")
    assert not any(weights.requires_grad for weights in control.engine.denoiser.parameters())


def test_all_components_of_an_untrained_hub_model_have_random_weights(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "PLANS", {"OWNER/NAME": read_plan(folder)})
    hub, local = difflex.load("OWNER/NAME", untrained=3), difflex.load(folder, untrained=3)
    weights = [next(iter(pipe.diffusers.components["text_encoder"].parameters())) for pipe in (hub, local)]
    assert not torch.equal(*weights)


def test_the_geometry_of_flux_is_in_the_package(monkeypatch: pytest.MonkeyPatch):
    for name, plan in PLANS.items():
        need = count_weights(plan, family_of(plan.pipeline))
        weights = {component: need.dense[component] + need.quantised[component] for component in need.dense}
        assert round(weights["transformer"] / 1e9, 1) == 11.9
        assert round(weights["text_encoder_2"] / 1e9, 2) == 4.76
        assert round(weights["text_encoder"] / 1e6) == 123 and round(weights["vae"] / 1e6) == 84
        assert name.endswith("dev") == plan.components["transformer"].config["guidance_embeds"]  # pyright: ignore[reportOptionalSubscript]


def test_an_untrained_flux_needs_no_file(monkeypatch: pytest.MonkeyPatch):
    plan = PLANS["black-forest-labs/FLUX.1-schnell"]
    small = {
        "vae": {"block_out_channels": [32, 32, 32, 32]},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "text_encoder_2": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 6, 6],
        },
    }
    components = {
        name: ComponentPlan(p.library, p.kind, {**p.config, **small.get(name, {})} if p.config else None)
        for name, p in plan.components.items()
    }
    monkeypatch.setattr(loading, "PLANS", {"black-forest-labs/FLUX.1-schnell": plan._replace(components=components)})
    pipe = difflex.load("black-forest-labs/FLUX.1-schnell", untrained=0)
    activations = next(pipe.harvest(pipe.shots(["Any prompt: 2 cats!"], steps=1, pixels=(32, 64)), "double.0", progress=False))
    assert activations.values.shape == (1, 8, 32) and activations.grid == (2, 4)


def test_the_estimate_equals_the_memory_of_the_weights(folder: Path):
    plan, pipe = read_plan(folder), difflex.load(folder)
    sizes = count_weights(plan, pipe.engine.family).bytes("fp32", torch.device("cpu"))
    for name, size in sizes.items():
        assert size == sum(parameter.nbytes for parameter in pipe.diffusers.components[name].parameters())


@pytest.mark.parametrize("untrained", [None, 0])
def test_the_estimate_for_nf4_on_a_cpu_is_close_to_the_memory_of_the_weights(folder: Path, untrained: int | None):
    plan, pipe, device = read_plan(folder), difflex.load(folder, precision="nf4", untrained=untrained), torch.device("cpu")
    sizes = count_weights(plan, pipe.engine.family).bytes("nf4", device)
    for name in ("transformer", "text_encoder_2", "vae"):
        size_in_memory = sum(parameter.nbytes for parameter in pipe.diffusers.components[name].parameters())
        assert abs(sizes[name] - size_in_memory) < 0.15 * size_in_memory


def test_nf4_on_a_cpu_is_not_advised_if_a_component_does_not_fit_before_quantisation(monkeypatch: pytest.MonkeyPatch):
    plan: PipelinePlan = PLANS["black-forest-labs/FLUX.1-dev"]
    family, device = family_of(plan.pipeline), torch.device("cpu")

    def message(gigabytes: float, precision: Precision) -> str:
        monkeypatch.setattr(loading, "free_memory", lambda device: round(gigabytes * 2**30))
        with pytest.raises(OutOfMemory) as raised:
            check_fits("FLUX.1-dev", plan, family, device, WeightPlacement(precision, False, 1))
        return str(raised.value)

    assert "while it is loaded" in message(40, "nf4") and message(40, "nf4").endswith("with precision='bf16'.")
    assert message(30, "fp32").endswith("No option makes it fit: use a larger machine or a smaller model.")


def test_a_model_is_quantised_component_by_component(folder: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    monkeypatch.setattr(loading, "quantise", lambda component, dtype: events.append(type(component).__name__) or component)
    build = ComponentPlan.build

    def recorded_build(component: ComponentPlan) -> object:
        events.append(f"build {component.kind}")
        return build(component)

    monkeypatch.setattr(ComponentPlan, "build", recorded_build)
    monkeypatch.setattr(loading, "check_fits", lambda *_: None)
    monkeypatch.setattr(loading, "PLANS", {"OWNER/NAME": read_plan(folder)})
    difflex.load("OWNER/NAME", precision="nf4", untrained=0)
    for kind in ("T5EncoderModel", "FluxTransformer2DModel"):
        assert events.index(kind) == events.index(f"build {kind}") + 1


def test_the_error_for_a_model_that_does_not_fit_names_an_option_that_would(monkeypatch: pytest.MonkeyPatch):
    plan: PipelinePlan = PLANS["black-forest-labs/FLUX.1-dev"]
    family, gpu = family_of(plan.pipeline), torch.device("cuda")

    def message(gigabytes: float, placement: WeightPlacement) -> str:
        monkeypatch.setattr(loading, "free_memory", lambda device: round(gigabytes * 2**30))
        with pytest.raises(OutOfMemory) as raised:
            check_fits("FLUX.1-dev", plan, family, gpu, placement)
        return str(raised.value)

    assert "transformer 22.2 GiB" in (text := message(24, WeightPlacement("bf16", False, 1))) and text.endswith(
        "with precision='nf4'."
    )
    assert message(50, WeightPlacement("fp32", False, 1)).endswith("with precision='bf16'.")
    assert message(8, WeightPlacement("bf16", False, 1)).endswith("with precision='nf4', offload=True.")
    assert message(20, WeightPlacement("fp16", False, 1)).endswith("with precision='nf4'.")
    assert message(2, WeightPlacement("bf16", False, 1)).startswith("The model 'FLUX.1-dev' needs 31.4 GiB in bf16")
    monkeypatch.setattr(loading, "free_memory", lambda device: 40 * 2**30)
    check_fits("FLUX.1-dev", plan, family, gpu, WeightPlacement("bf16", False, 1))


def test_the_error_for_a_missing_weight_names_it(tmp_path: Path):
    path = tiny_folder("flux", tmp_path / "model") / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "proj_out.weight"}, path)
    with pytest.raises(BrokenFile, match=r"do not hold the weights transformer\.proj_out\.weight"):
        difflex.load(tmp_path / "model", device="cpu")


def test_the_error_for_a_damaged_config_names_the_component(tmp_path: Path):
    folder = tiny_folder("flux", tmp_path / "flux")
    (folder / "transformer" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(BrokenFile, match="transformer"):
        difflex.load(folder)


def test_each_rank_gets_whole_runs(folder: Path):
    pipe = difflex.load(folder)
    shots = list(pipe.shots([f"a star {i}" for i in range(5)], steps=2))
    parts = [list(shots_of_rank(shots, Ranks(rank, 3))) for rank in range(3)]
    assert sorted((shot.prompt, shot.timestep or 0) for part in parts for shot in part) == sorted(
        (shot.prompt, shot.timestep or 0) for shot in shots
    )
    assert all(
        replace(a, timestep=None) == replace(b, timestep=None)
        for part in parts
        for a, b in zip(part[::2], part[1::2], strict=True)
    )


SHARDED = """
import sys, torch
import torch.distributed as dist
import difflex
torch.set_num_threads(1)
folder, out = sys.argv[1:]
pipe = difflex.load(folder, device="cpu", sharded=True)
prompts = [f"a star {i}" for i in range(5)]
sites = ["double.0", "single.1:update", "single.0:text"]
for repeat in range(2):  # the second time after stopped passes
    activations = {
        (str(a.site), shot.prompt, shot.timestep): a.values[i]
        for a in pipe.harvest(pipe.shots(prompts, steps=3, keep_steps=[0, 2]), sites, batch=1, progress=False)
        for i, shot in enumerate(a.shots)
    }
images = pipe.generate(prompts[:2])
torch.save((activations, [list(p.image.tobytes()) for p in images]), f"{out}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_denoiser_sharded_over_two_processes_computes_the_same_bits(folder: Path, tmp_path: Path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "sharded.py"),
    ]
    process = subprocess.run(
        [*command, str(folder), str(tmp_path)], capture_output=True, text=True, env={**os.environ}, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    pipe = difflex.load(folder)
    whole = {
        (str(a.site), a.shots[0].prompt, a.shots[0].timestep): a.values[0]
        for a in pipe.harvest(
            pipe.shots([f"a star {i}" for i in range(5)], steps=3, keep_steps=[0, 2]),
            ["double.0", "single.1:update", "single.0:text"],
            batch=1,
            progress=False,
        )
    }
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    sharded = [activations for activations, _ in ranks]
    assert not sharded[0].keys() & sharded[1].keys() and sharded[0].keys() | sharded[1].keys() == whole.keys()
    assert all(torch.equal(whole[key], activations[key]) for activations in sharded for key in activations)
    assert ranks[0][1] == ranks[1][1] == [list(g.image.tobytes()) for g in pipe.generate(["a star 0", "a star 1"])]


def test_the_error_for_sharding_outside_of_torchrun_says_how_to_start(folder: Path):
    with pytest.raises(BadInput, match="torchrun --nproc-per-node"):
        difflex.load(folder, sharded=True)


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "text_length"),
    [("FLUX.1-schnell", 4, 0.0, 256), ("FLUX.1-dev", 28, 3.5, 512)],
)
def test_the_defaults_of_flux_depend_on_its_variant(name: str, steps: int, guidance: float, text_length: int):
    plan = next(plan for model, plan in PLANS.items() if model.endswith(name))
    defaults = read_defaults(None, family_of(plan.pipeline), plan)
    assert (defaults.steps, defaults.guidance, defaults.text_length) == (steps, guidance, text_length)


@pytest.mark.parametrize(
    ("scheduler", "settings", "steps", "guidance"),
    [
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 4, 0.0),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 50, 5.0),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 50, 5.0),
        ("EulerDiscreteScheduler", {}, 50, 5.0),
    ],
)
def test_a_turbo_model_is_recognised_by_its_scheduler(scheduler: str, settings: dict[str, str], steps: int, guidance: float):
    plan = PipelinePlan("StableDiffusionXLPipeline", {"scheduler": ComponentPlan("diffusers", scheduler, settings)}, {})
    defaults = read_defaults(None, family_of(plan.pipeline), plan)
    assert (defaults.steps, defaults.guidance) == (steps, guidance)


@pytest.mark.parametrize(
    ("component", "entry", "value"),
    [("transformer", "axes_dims_rope", [4, 4, {}]), ("transformer", "num_layers", "two"), ("vae", "act_fn", 3)],
)
def test_an_entry_of_another_type_in_a_config_is_refused(tmp_path: Path, component: str, entry: str, value: object):
    path = next(tiny_folder("flux", tmp_path / "model").glob(f"{component}/*config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(BrokenFile, match=rf"The config of \S*{component} has an entry '{entry}'"):
        difflex.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_without_vocabulary_or_settings_is_refused(tmp_path: Path, name: str):
    (tiny_folder("flux", tmp_path / "model") / "tokenizer" / name).unlink()
    with pytest.raises(BrokenFile, match=r"The tokenizer in \S*tokenizer has no tokenizer"):
        difflex.load(tmp_path / "model")


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
def test_the_weights_of_another_component_are_refused(tmp_path: Path, component: str):
    folder = tiny_folder("flux", tmp_path / "model")
    [own], [other] = (sorted(folder.glob(f"{name}/*.safetensors")) for name in (component, "text_encoder_2"))
    own.write_bytes(other.read_bytes())
    with pytest.raises(BrokenFile, match=component):
        difflex.load(folder)


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("eos_token", "<unheard-of>", "tokenizer has a special token with the number"),
        ("model_max_length", None, r"tokenizer has prompts of 1e\+30 tokens, of which the encoder reads"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_encoder_is_refused(tmp_path: Path, setting: str, value: str | None, complaint: str):
    path = tiny_folder("flux", tmp_path / "model") / "tokenizer" / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), setting: value}
    path.write_text(json.dumps({name: entry for name, entry in settings.items() if entry is not None}))
    with pytest.raises(BrokenFile, match=complaint):
        difflex.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("gigabytes", "flags", "precision", "offload"),
    [
        (79, {}, "bf16", False),
        (79, {"offload": True}, "bf16", True),
        (40, {}, "bf16", False),
        (40, {"reserve": 8 * 2**30}, "bf16", True),
        (32, {}, "bf16", True),
        (32, {"offload": False}, "nf4", False),
        (23.5, {}, "nf4", False),
        (8, {}, "nf4", True),
        (4, {}, "nf4", True),  # which load refuses
    ],
)
def test_the_precision_of_flux_is_chosen_by_the_free_memory(
    gigabytes: float, flags: dict[str, Any], precision: str, offload: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "find_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(loading, "free_memory", lambda device: round(gigabytes * 2**30))
    lines = list[str]()
    assert choose_precision("black-forest-labs/FLUX.1-schnell", report=lines.append, **flags) == (precision, offload)
    if gigabytes == 23.5:
        assert lines == [
            "Precision auto: nf4. The model 'black-forest-labs/FLUX.1-schnell' needs 34.5 GiB in bf16, 24.4 GiB in bf16 with "
            "offload, 11.8 GiB in nf4, and cuda has 23.5 GiB free."
        ]


def test_on_a_cpu_the_chosen_precision_is_fp32(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert difflex.load(folder, precision="auto").precision == "fp32"
    assert capsys.readouterr().out == "Precision auto: fp32, on cpu.\n"
