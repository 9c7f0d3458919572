"""The editing benchmark: its items and masks, what a transfer adds and removes, and the edit-bench command."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from difflex.cli import main
from difflex.commands.effects import EditBenchCommand
from difflex.commands.estimates import estimate
from difflex.commands.forecast import DictionaryForecast, Forecast, Machine
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.effects.edit_bench.drawn import ASKED, FIRST_ITEM, DrawnEditJudge, drawn_items, write_caption
from difflex.effects.edit_bench.items import (
    EDIT_TYPES,
    EditItem,
    EditMasks,
    EditType,
    TransferMasks,
    masked_world,
    on_tokens,
    read_riebench,
    required_masks,
)
from difflex.effects.edit_bench.places import transfer_places
from difflex.effects.edit_bench.results import (
    REFERENCES,
    EditArm,
    EditBenchConfig,
    EditBenchResults,
    EditedItem,
    ImageScorer,
    with_score,
)
from difflex.effects.edit_bench.transfer import (
    CodedTokens,
    ItemTransfer,
    NeuronTokens,
    RecordedRun,
    TransferHook,
    WholeTokens,
    choose_parts,
    contrast_directions,
    part_scores,
)
from difflex.errors import BadInput, UnknownName
from difflex.evaluation import ClipModel
from difflex.miniature import draw, load_judge
from difflex.miniature.captions import parse_caption
from difflex.miniature.world import SceneMix
from difflex.records import Activations, HookContext, Shot, Site
from difflex.study import Study
from difflex.testing import tiny_clip, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
SITE = Site("double.1")
GRID = (2, 2)


def item(kind: str = "object", **changes: object) -> EditItem:
    values = {"id": "1", "type": kind, "source": "a cat", "target": "a dog", "seed": 3, **changes}
    return EditItem(**values)  # pyright: ignore[reportArgumentType]


def mask(*tokens: int) -> torch.Tensor:
    """A mask of 2 x 2 pixels."""
    return torch.tensor([number in tokens for number in range(4)]).view(2, 2)


def run_of(*steps: torch.Tensor) -> RecordedRun:
    run = RecordedRun()
    for number, values in enumerate(steps):
        run.add(SITE, 1000.0 - number, values, GRID)
    return run


def transfer(kind: str, source: torch.Tensor, target: torch.Tensor, masks: EditMasks) -> ItemTransfer:
    edited = item(kind)
    return ItemTransfer(edited, TransferMasks.of(edited, masks), run_of(source, source), run_of(target, target))


def test_captions_of_drawn_items_state_all_that_their_pairs_differ_in():
    items = drawn_items(EDIT_TYPES, 6)
    assert len({own.id for own in items}) == len(items) == 54 and len({own.seed for own in items}) == 54
    for own in items:
        source, target = parse_caption(own.source), parse_caption(own.target)
        assert (write_caption(source), write_caption(target)) == (own.source, own.target)
        assert not source.unknown and not target.unknown and source.style and source.background
        if own.type in ("add", "delete"):
            assert len(target.objects) - len(source.objects) == (1 if own.type == "add" else -1)
            continue
        groups = ("shape", "colour", "texture", "row", "column")
        changed = {group for group in groups if getattr(source.objects[0], group) != getattr(target.objects[0], group)}
        changed |= {group for group in ("background", "style") if getattr(source, group) != getattr(target, group)}
        changed = {"position" if group in ("row", "column") else group for group in changed}
        assert changed == {*ASKED[own.type]}
    assert drawn_items(("pose",), 2) == [own for own in items if own.type == "pose"][:2]


@pytest.mark.parametrize("kind", ["colour", "background", "delete"])
def test_the_judge_scores_what_is_asked_and_what_is_kept(kind: EditType):
    judge, number = DrawnEditJudge(load_judge()), EDIT_TYPES.index(kind)
    seeds = torch.arange(4) + FIRST_ITEM + number * 10**6
    scenes = draw(seeds, SceneMix(0, 1, 0) if kind == "delete" else SceneMix(1, 0, 0))
    items = drawn_items((kind,), 4)
    scores = judge.scores(items, scenes.images, scenes.images)
    assert [own["success"] for own in scores] == [0.0] * 4 and [own["kept"] for own in scores] == [1.0] * 4
    backwards = [replace(own, source=own.target, target=own.source) for own in items]
    if kind != "delete":
        assert [own["success"] for own in judge.scores(backwards, scenes.images, scenes.images)] == [1.0] * 4
    masks = torch.stack([own.source for own in judge.masks(items, scenes.images, scenes.images)])
    slot = {"colour": 0, "background": -1, "delete": 1}[kind]
    assert float((masks == (scenes.slots == slot)).float().mean()) > 0.98


def test_masks_follow_the_rules_of_the_edit_types():
    masks = EditMasks(mask(0), mask(1))
    for kind, donor, edited, changed in (
        ("object", mask(1), mask(0), mask(0, 1)),
        ("add", mask(1), mask(1), mask(1)),
        ("delete", mask(1, 2, 3), mask(0), mask(0)),
    ):
        rules = TransferMasks.of(item(kind), masks)
        assert all(torch.equal(*pair) for pair in zip(rules, (donor, edited, changed), strict=True)), kind
    assert on_tokens(torch.eye(4, dtype=torch.bool), (2, 2)).tolist() == [True, False, False, True]  # pyright: ignore
    assert on_tokens(mask(0), None) == slice(None)


def test_parts_are_scored_by_their_shares_and_chosen_over_all_sites():
    scores = part_scores(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert scores.tolist() == [0.5, 0.0, -0.5]
    first, second = choose_parts([scores, torch.tensor([0.6, -0.1])], 2)
    assert first.added.tolist() == [True, False, False] and second.added.tolist() == [True, False]
    assert first.removed.tolist() == [False, False, True] and second.removed.tolist() == [False, True]
    assert all(bool(part.all()) for own in choose_parts([scores], None) for part in own)


def test_whole_activations_at_strength_1_make_the_source_the_target():
    source, target = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    own = transfer("object", source, target, EditMasks(mask(0, 1), mask(0, 1)))
    [deltas] = own.deltas({SITE: WholeTokens}, (None,))
    expected = torch.cat([target[:2], source[2:]])
    for delta in deltas[SITE].values():
        torch.testing.assert_close(source + delta, expected)
    [moved] = transfer("pose", source, target, EditMasks(mask(0), mask(3))).deltas({SITE: WholeTokens}, (None,))
    torch.testing.assert_close(moved[SITE][1000.0][[0, 3]], torch.stack([-source[0], target[3]]))


def test_a_deleted_object_gets_the_mean_of_all_else():
    source, target = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    [deltas] = transfer("delete", source, target, EditMasks(mask(0), mask(1))).deltas({SITE: WholeTokens}, (None,))
    delta = deltas[SITE][999.0]
    torch.testing.assert_close(source[0] + delta[0], source[1:].mean(0))
    assert not bool(delta[1:].any())


def test_neurons_and_features_move_their_own_share():
    source, target = torch.tensor([[1.0, 0, 0]] * 4), torch.tensor([[0.0, 2, 0]] * 4)
    own = transfer("object", source, target, EditMasks(mask(0), mask(0)))
    one, two = own.deltas({SITE: NeuronTokens}, (1, 3))
    assert one[SITE][1000.0][0].tolist() == two[SITE][1000.0][0].tolist() == [-1.0, 2.0, 0.0]
    dictionary = sae(3, "m")
    sums = [CodedTokens(dictionary, target).sums(part) for part in (torch.ones(24) > 0, torch.ones(24) < 0)]
    codes = dictionary.encode(target)
    torch.testing.assert_close(sums[0], dictionary.delta(codes))
    assert not bool(sums[1].any())
    means = CodedTokens(dictionary, target).means()
    assert float(means.sum()) == pytest.approx(float(codes.values.sum(1).mean()))


def test_a_contrast_is_as_long_as_the_difference_of_the_masks():
    source, target = torch.zeros(4, 3), torch.tensor([[0.0, 2, 0]] * 4)
    own = transfer("colour", source, target, EditMasks(mask(0), mask(0)))
    runs = [shot("a cat", source), shot("a dog", target * 5)]
    directions = contrast_directions(own.item, [SITE], runs)
    deltas = own.contrast_deltas([SITE], directions)
    torch.testing.assert_close(deltas[SITE][1000.0], torch.tensor([[0.0, 2, 0], *[[0.0, 0, 0]] * 3]))


def shot(prompt: str, values: torch.Tensor) -> Activations:
    own = Shot(model="m", prompt=prompt, seed=9, pixels=(2, 2), steps=1, guidance=0.0, timestep=1000.0)
    return Activations(site=SITE, values=values[None], shots=(own,), grid=GRID)


def test_a_hook_edits_its_own_images_in_the_conditional_half():
    shots = (shot("a cat", torch.zeros(4, 3)).shots[0], shot("else", torch.zeros(4, 3)).shots[0])
    hook = TransferHook({("a cat", 9): {1000.0: torch.ones(4, 3)}}, 2.0)
    x = torch.zeros(2, 4, 3)
    edited = hook(x, HookContext(0, 1000.0, None, shots, GRID))
    assert edited is not None and edited[0].eq(2).all() and edited[1].eq(0).all() and x.eq(0).all()
    assert hook(x, HookContext(0, 1000.0, "unconditional", shots, GRID)) is None
    assert hook(x, HookContext(1, 900.0, None, shots, GRID)) is None


ENTRIES = [
    {
        "id": "111000000006",
        "editing_type_id": "1",
        "original_prompt": "[cat] on the roof",
        "editing_prompt": "[dog] on the roof",
        "editing_instruction": "",
        "original_gsam_prompt": "cat",
        "editing_gsam_prompt": "dog",
    },
    {
        "id": "811",
        "editing_type_id": "8",
        "original_prompt": "a cat",
        "editing_prompt": "a cat [at night]",
        "edit_source": "background",
        "edit_target": "background",
        "is_good": True,
    },
    {
        "id": "311",
        "editing_type_id": "3",
        "original_prompt": "a cat with a hat",
        "editing_prompt": "a cat",
        "original_gsam_prompt": "hat",
        "editing_gsam_prompt": "~hat",
    },
    {
        "id": "911",
        "editing_type_id": "9",
        "original_prompt": "a cat",
        "editing_prompt": "a drawing of a cat",
        "original_gsam_prompt": "#everything",
        "editing_gsam_prompt": "#everything",
    },
    {"id": "2", "editing_type_id": "2", "original_prompt": "a", "editing_prompt": "[a]", "edit_source": "", "edit_target": ""},
]


def write_items(folder: Path, entries: object = ENTRIES) -> Path:
    path = folder / "riebench.json"
    path.write_text(json.dumps(entries))
    return path


def test_both_versions_of_riebench_are_read(tmp_path: Path):
    items = read_riebench(write_items(tmp_path))  # the prompts of the last one do not differ
    assert [own.type for own in items] == ["object", "background", "delete", "style"]
    assert (items[0].source, items[0].target, items[0].seed) == ("cat on the roof", "dog on the roof", 42)
    assert required_masks(items[0]) == {
        "source": ("111000000006-source.png", "cat"),
        "target": ("111000000006-target.png", "dog"),
    }
    assert required_masks(items[1])["target"] == ("811-target.png", "foreground")
    assert required_masks(items[2]) == {"source": ("311-source.png", "hat")} and required_masks(items[3]) == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "not a list of items"),
        ([], "not a list of items"),
        ([{"id": "1"}], "Item 0 .* has no 'editing_type_id'"),
        ([{**ENTRIES[0], "editing_type_id": "0"}], "editing_type_id '0' is unknown"),
        ([{**ENTRIES[0], "id": "../x"}], "cannot be the name of a file"),
        ([ENTRIES[0], ENTRIES[0]], "'111000000006' twice"),
    ],
)
def test_files_that_hold_no_items_are_refused(tmp_path: Path, entries: object, message: str):
    with pytest.raises(BadInput, match=message):
        read_riebench(write_items(tmp_path, entries))
    with pytest.raises(BadInput, match="cannot be read as items"):
        read_riebench(tmp_path)


def test_masks_are_inverted_where_the_words_say_so(tmp_path: Path):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 4, 8))
    for own in read_riebench(write_items(tmp_path)):
        for name, _ in required_masks(own).values():
            image.save(tmp_path / name)
    world = masked_world(write_items(tmp_path), tmp_path)
    assert world.name == "riebench" and world.files["items"] and len(world.files) == 6
    world.check(world.items, tmp_path)
    masks = world.masks(world.items, torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8))
    left = torch.arange(8).expand(8, 8) < 4
    assert torch.equal(masks[0].source, left) and torch.equal(masks[1].source, ~left) and bool(masks[3].source.all())
    Image.new("L", (8, 8)).save(tmp_path / "311-source.png")
    with pytest.raises(BadInput, match=r"311-source.png for 'hat' covers no pixel"):
        world.masks(world.items[2:3], torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def sae(width: int, model: str, site: Site = SITE) -> Dictionary:
    directions = torch.nn.functional.normalize(torch.randn(24, width, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = SAEWeights(encoder=directions, decoder=directions.clone(), bias=torch.zeros(width), encoder_bias=torch.zeros(24))
    origin = DictionaryOrigin(site=site, model=model)
    return SAE(kind="topk", k=4, origin=origin, normalisation=Normalisation.identity(width), weights=weights)


def test_places_are_each_site_alone_and_all_together(tmp_path: Path):
    study = Study.begin(tmp_path, "mini-flux")
    with pytest.raises(UnknownName, match="has no dictionaries for the methods"):
        transfer_places(study, EditBenchConfig())
    for path in ("double.1", "double.2"):
        sae(8, "mini-flux", Site(path)).save(study.dictionary(path, "topk-24-k4"))
    names = [(place.method, place.name) for place in transfer_places(study, EditBenchConfig(methods=("features", "contrast")))]
    assert names == [
        ("features", "double.1/topk-24-k4"),
        ("features", "double.2/topk-24-k4"),
        ("features", "double.1,double.2/topk-24-k4"),
        ("contrast", "double.1"),
        ("contrast", "double.2"),
        ("contrast", "double.1,double.2"),
    ]
    config = EditBenchConfig(sites=("single.0:neurons", "double.2"), methods=("features", "neurons", "activations"))
    assert [place.name for place in transfer_places(study, config)] == ["double.2/topk-24-k4", "single.0:neurons", "double.2"]
    config = EditBenchConfig(sites=("single.0:neurons,single.1:neurons", "double.2,single.0"), methods=("neurons", "contrast"))
    assert [place.name for place in transfer_places(study, config)] == [*config.sites]
    config = EditBenchConfig(dictionaries=("double.1", "double.1"), methods=("features",), features=(4, 4), strengths=(1.0, 1.0))
    [place] = transfer_places(study, config)
    assert place.arms(config) == [EditArm("features", "double.1/topk-24-k4", 4, 1.0)]


SITES = {
    "flux": ("double.1,double.1:text", "double.1:neurons,single.1:neurons"),
    "sdxl": ("up.0.0:update,mid.0:update", "up.0.0.0:neurons"),
    "sd3": ("joint.0", "joint.1:update"),
}


@pytest.mark.parametrize("family", SITES)
def test_the_benchmark_runs_on_any_family_with_items_of_a_file(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_folder(family, tmp_path / "model")
    study, items = Study.begin(tmp_path / "study", str(model)), write_items(tmp_path)
    command = ["edit-bench", str(study.folder), "--items", str(items), "--site", *SITES[family], "--strength", "1"]
    command += ["--method", "activations", "contrast", "neurons", "--neurons", "4", "--pairs", "1", "--steps", "1"]
    assert main(command) == 2
    error, folder = capsys.readouterr().err, study.folder / "steering/edit-bench/riebench"
    assert "5 masks are missing" in error and "111000000006-source.png: 'cat'" in error
    images = sorted(folder.glob("*/*.png"))
    assert len(images) == 8
    with Image.open(images[0]) as image:
        white = Image.new("L", image.size)
    white.paste(255, (0, 0, white.width // 2, white.height // 2))
    for own in read_riebench(items):
        for name, _ in required_masks(own).values():
            white.save(tmp_path / name)
    assert main([*command, "--masks", str(tmp_path)]) == 0
    assert "4 items" in capsys.readouterr().out
    results = EditBenchResults.load(folder.with_suffix(".json"))
    assert results.types == ["object", "delete", "background", "style"] and not results.is_judged
    assert {arm.place for arm in results.best_arms()} == {"", *SITES[family]}
    assert results.value("object", REFERENCES[0], "toward") == 0.0 and results.value("object", REFERENCES[1], "toward") == 1.0
    assert main([*command, "--masks", str(tmp_path)]) == 0
    assert "4 items, as before" in capsys.readouterr().out
    assert results.all_arms[:2] == [*REFERENCES] and len(results.all_arms) > 4


def test_images_are_scored_by_pixels_clip_and_lpips(tmp_path: Path):
    scorer = ImageScorer(
        ClipModel(str(tiny_clip(tmp_path / "clip"))), lambda images, others: (images - others).abs().mean((1, 2, 3))
    )
    source, target = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    changed = torch.arange(32).expand(32, 32) < 16
    edited = torch.where(changed, 0.5, 0.25).expand(1, 3, 32, 32)
    [row] = scorer([item()], [changed], source, target, edited)
    assert row["outside"] == 0.25 and row["toward"] == 0.5 and row["lpips source"] == 0.375 and row["lpips target"] == 0.625
    assert with_score(row)["score"] == row["clip gain"] and -1 <= row["clip image target"] <= 1
    [same] = scorer([item()], [changed], source, target, source)
    assert same["clip gain"] == 0.0 and same["clip image source"] == pytest.approx(1, abs=1e-5)
    assert "toward" not in scorer([item()], [changed], source, source, edited)[0]
    assert with_score({"success": 1.0, "kept": 0.5})["score"] == 0.5 and with_score({})["score"] == 0.0


FLAGS = ["--strength", "1", "--method", "activations", "--site", "double.1", "--type", "colour", "style"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of mini-flux with a dictionary, after the benchmark on one item of two types."""
    study = Study.begin(tmp_path_factory.mktemp("drawn") / "study", "mini-flux-small")
    assert main(["edit-bench", str(study.folder), *FLAGS, "--count", "1"]) == 0
    return study


def test_items_of_the_drawn_world_are_judged(drawn: Study):
    [path] = drawn.edit_benches()
    results = EditBenchResults.load(path)
    assert results.is_judged and results.items == 2 and results.types == ["colour", "style"]
    assert results.value("all", REFERENCES[0], "success") == 0.0
    entry = EditedItem.load(path.with_suffix("") / "colour-0.json")
    assert [*entry.scores][:2] == ["none", "prompt"] and entry.scores["none"]["kept"] == 1.0
    assert entry.scores["none"]["outside"] == 0.0 and entry.scores["prompt"]["toward"] == 1.0
    with Image.open(path.with_suffix("") / "colour-0.webp") as sheet:
        assert sheet.size == (3 * 64, 64)


def test_more_items_are_added_to_finished_ones_and_damaged_ones_are_made_again(drawn: Study, capsys: pytest.CaptureFixture[str]):
    folder = drawn.edit_bench("drawn").with_suffix("")
    before = (folder / "colour-0.json").read_bytes()
    (folder / "style-0.webp").write_bytes(b"damaged")
    assert main(["edit-bench", str(drawn.folder), *FLAGS, "--count", "2"]) == 0
    assert "1 of 4 items are finished already" in capsys.readouterr().out
    assert (folder / "colour-0.json").read_bytes() == before and len(list(folder.glob("*.json"))) == 4
    with Image.open(folder / "style-0.webp") as sheet:
        sheet.verify()


def test_the_cost_of_the_benchmark_is_predicted(drawn: Study):
    forecast = Forecast(Machine.with_cpu(1e11, 1 << 40), dictionaries={(drawn.folder, SITE): (DictionaryForecast(24, 4, 192),)})
    one, two = (estimate(forecast, EditBenchCommand(study=drawn.folder, count=count)) for count in (1, 2))
    # Two numbers of features of a dictionary, alone and together, activations and contrasts, at three strengths.
    assert one.bytes == 9 * (4 + 4) * 3 * 6000 and one.seconds and two.seconds and two.seconds > 1.5 * one.seconds
    assert "not known" in estimate(Forecast(Machine.with_cpu(1e11, 1 << 40)), EditBenchCommand(study=drawn.folder)).unknown


@pytest.mark.slow
def test_a_killed_benchmark_continues_and_ends_with_the_same_results(drawn: Study, tmp_path: Path):
    flags = ["edit-bench", "study", *FLAGS, "--count", "6"]
    study = Study.begin(tmp_path / "study", "mini-flux-small")
    folder = study.edit_bench("drawn").with_suffix("")
    finished: list[Path] = []
    process = subprocess.Popen([sys.executable, "-m", "difflex", *flags], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (finished := list(folder.glob("*.json"))):
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and finished and not study.edit_benches()
    times = {path: path.stat().st_mtime_ns for path in finished}
    command = ["edit-bench", str(study.folder), *FLAGS, "--count", "6"]
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    assert main([*command[:1], str(drawn.folder), *command[2:]]) == 0
    ends = [EditBenchResults.load(own.edit_bench("drawn")) for own in (study, drawn)]
    for arm in ends[0].best_arms():  # batches of other items round differently
        for measure in ("success", "kept", "outside", "toward"):
            assert ends[0].value("all", arm, measure) == pytest.approx(ends[1].value("all", arm, measure), abs=0.02)
