"""SimMIM bundles from end to end: train, evaluate, features, reconstructions, fine-tuning, faults.

What does not depend on the pretext task is tested with the MAE bundle.
"""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import SwinUNETR, ViT
from monai.networks.nets.swin_unetr import SwinTransformer

from medmim import build_encoder, load_encoder
from medmim.description import build_network, read_description
from tests.common import SIMMIM_SWIN, SIMMIM_VIT, SWIN_UNETR, TINY_OF, UNETR, rows, tensorboard_names

Run = Callable[..., ConfigWorkflow]
FIXTURE = {SIMMIM_VIT: "pretrained_simmim_vit", SIMMIM_SWIN: "pretrained_simmim_swin"}
FEATURES = {SIMMIM_VIT: (48, 2, 3, 2), SIMMIM_SWIN: (192, 2, 1, 1)}  # of one window
UNIT = {SIMMIM_VIT: 8, SIMMIM_SWIN: 16}  # voxels that are hidden as one
each = pytest.mark.parametrize("bundle", FIXTURE)


@pytest.fixture
def trained(bundle: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(FIXTURE[bundle])


def window(bundle: str) -> tuple[int, ...]:
    return tuple(TINY_OF[bundle]["roi_size"])


@each
def test_training_writes_everything_and_lowers_the_loss(bundle: str, trained: Path) -> None:
    output = trained / "output"
    for name in ("checkpoint.pt", "curves.png", "previews/epoch_0008.png"):
        assert (output / name).stat().st_size > 0, name
    assert {"train_loss", "learning_rate", "val_loss"} <= tensorboard_names(output / "tensorboard")
    assert sorted(path.name for path in (trained / "models").iterdir()) == ["encoder.pt", "model.json", "model.pt"]
    scalars = rows(output / "scalars.csv")
    assert float(scalars[-1]["train_loss"]) < 0.85 * float(scalars[0]["train_loss"])
    assert float(scalars[-1]["val_loss"]) < float(scalars[3]["val_loss"])


@each
def test_encoder_is_a_stock_one(bundle: str, trained: Path) -> None:
    content = torch.load(trained / "models" / "encoder.pt", weights_only=True)
    network = content["description"]["network"]
    encoder_class = {"ViT": ViT, "SwinTransformer": SwinTransformer}[network["name"]]
    stock = encoder_class(**network["arguments"]).eval()
    stock.load_state_dict(content["state_dict"], strict=True)
    image = torch.rand(1, 1, *window(bundle))
    ours = build_encoder(trained / "models" / "encoder.pt").eval()
    torch.testing.assert_close(stock(image), ours(image))


def test_swin_gets_into_swin_unetr(pretrained_simmim_swin: Path) -> None:
    sizes = {key: TINY_OF[SIMMIM_SWIN][key] for key in ("feature_size", "depths", "num_heads", "window_size")}
    unetr = SwinUNETR(in_channels=1, out_channels=3, **sizes).eval()
    path = pretrained_simmim_swin / "models" / "encoder.pt"
    strict = torch.load(path, weights_only=True)["state_dict"]
    unetr.swinViT.load_state_dict(strict, strict=True)
    image = torch.rand(1, 1, *window(SIMMIM_SWIN))
    ours = build_encoder(path).eval()
    for found, expected in zip(unetr.swinViT(image), ours(image), strict=True):
        assert torch.equal(found, expected)
    other = SwinUNETR(in_channels=1, out_channels=3, **sizes).eval()
    report = load_encoder(other, path)
    assert not report.new
    assert len(report.loaded) == len(strict)
    assert torch.equal(other.swinViT(image)[-1], ours(image)[-1])


@each
def test_description_builds_the_model(bundle: str, trained: Path) -> None:
    network = build_network(read_description(trained / "models" / "model.json"))
    network.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True), strict=True)
    assert network(torch.rand(2, 1, *window(bundle))).shape == (2, *FEATURES[bundle])


@each
def test_training_changed_the_encoder(bundle: str, trained: Path, run_bundle: Run, tmp_path: Path) -> None:
    run_bundle(bundle, "train", folder=tmp_path, epochs=1, learning_rate=0.0)
    start, end = (
        torch.load(folder / "models" / "encoder.pt", weights_only=True)["state_dict"] for folder in (tmp_path, trained)
    )
    fixed = {name for name, value in start.items() if torch.equal(value, end[name])}
    unused = ("norm_cross_attn", "position_embeddings", "relative_position_index")
    assert fixed == {name for name in start if any(part in name for part in unused)}


@each
def test_evaluation_repeats_the_last_validation(bundle: str, trained: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = trained / "output" / "checkpoint.pt"
    workflow = run_bundle(bundle, "train", "evaluate", folder=tmp_path, checkpoint=checkpoint)
    found = workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_loss"]
    assert found == pytest.approx(float(rows(trained / "output" / "scalars.csv")[-1]["val_loss"]), rel=1e-5)


@each
def test_evaluation_needs_the_spacing_of_training(
    bundle: str, trained: Path, run_bundle: Run, tmp_path: Path, record_property: Callable
) -> None:
    checkpoint = trained / "output" / "checkpoint.pt"
    with pytest.raises(SystemExit) as refused:
        run_bundle(bundle, "train", "evaluate", folder=tmp_path, checkpoint=checkpoint, spacing_factor=2)
    record_property("error", str(refused.value))
    assert "spacing" in str(refused.value)


@each
def test_features_of_a_scan(bundle: str, trained: Path, run_bundle: Run, tmp_path: Path) -> None:
    size = window(bundle)
    volume = np.random.default_rng(0).uniform(-170, 250, size).astype(np.float32)
    scan = tmp_path / "scans" / "one.nii.gz"
    scan.parent.mkdir()
    nib.save(nib.Nifti1Image(volume, np.diag([8.0, 8.0, 8.0, 1.0])), scan)
    run_bundle(bundle, "inference", folder=tmp_path, dataset_dir=scan.parent, models_dir=trained / "models")
    features = nib.load(tmp_path / "output" / "one_features.nii.gz")
    n_features, *grid = FEATURES[bundle]
    values = features.get_fdata().reshape(*grid, n_features)
    cell = [8.0 * n / cells for n, cells in zip(size, grid, strict=True)]  # mm
    np.testing.assert_allclose(nib.affines.voxel_sizes(features.affine), cell)
    encoder = build_encoder(trained / "models" / "encoder.pt").eval()
    with torch.no_grad():
        output = encoder(torch.from_numpy((volume + 175) / 425)[None, None])
    expected = output[0][0].reshape(*grid, n_features) if bundle == SIMMIM_VIT else output[-1][0].movedim(0, -1)
    np.testing.assert_allclose(values, expected.numpy(), atol=1e-3)


@each
def test_reconstructions(bundle: str, trained: Path, run_bundle: Run, tmp_path: Path) -> None:
    checkpoint = trained / "output" / "checkpoint.pt"
    run_bundle(bundle, "train", "reconstruct", folder=tmp_path, checkpoint=checkpoint, scans=1)
    folder = tmp_path / "output" / "reconstructions" / "imagesTr"
    (masked,) = folder.glob("*_masked.nii.gz")
    assert len(list(folder.glob("*_reconstruction.png"))) == 1
    voxels = nib.load(masked).get_fdata()
    changed = voxels != nib.load(str(masked).replace("_masked", "_reconstruction")).get_fdata()
    unit = UNIT[bundle]
    a, b, c = (n // unit for n in changed.shape)
    blocks = changed.reshape(a, unit, b, unit, c, unit).transpose(0, 2, 4, 1, 3, 5).reshape(-1, unit**3)
    hidden = blocks.mean(axis=1)
    assert set(np.round(hidden)) == {0, 1}
    assert (hidden[hidden < 0.5] == 0).all()  # a unit is hidden as a whole or not at all


@pytest.mark.parametrize(
    ("bundle", "knobs"),
    [
        (SIMMIM_VIT, {"decoder": "mlp", "mask_unit": 8, "normalize_target": True, "loss_region": "all"}),
        (
            SIMMIM_VIT,
            {"decoder": "upsampling", "roi_size": [24, 24, 24], "patch_size": [8, 8, 8], "spacing_factor": 1.5},
        ),
        (SIMMIM_VIT, {"decoder": "transformer", "position_embedding": "learnable", "activation_checkpointing": True}),
        pytest.param(SIMMIM_SWIN, {"decoder": "linear", "mask_unit": 32, "use_v2": True}, marks=pytest.mark.slow),
        pytest.param(SIMMIM_SWIN, {"decoder": "transformer", "normalize_target": True}, marks=pytest.mark.slow),
        pytest.param(SIMMIM_SWIN, {"mask_unit": None, "mask_ratio": 0.9}, marks=pytest.mark.slow),
        pytest.param(SIMMIM_SWIN, {"decoder": "mlp", "activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_knobs_of_the_study(bundle: str, knobs: dict, run_bundle: Run, tmp_path: Path) -> None:
    run_bundle(bundle, "train", folder=tmp_path, epochs=1, **knobs)
    assert float(rows(tmp_path / "output" / "scalars.csv")[0]["val_loss"]) > 0
    if "spacing_factor" in knobs:
        assert read_description(tmp_path / "models" / "model.json")["preset"]["spacing"] == [12.0, 12.0, 12.0]


@pytest.mark.parametrize(
    ("bundle", "downstream"),
    [(SIMMIM_VIT, UNETR), pytest.param(SIMMIM_SWIN, SWIN_UNETR, marks=pytest.mark.slow)],
)
def test_fine_tuning_starts_from_it(
    bundle: str, downstream: str, run_bundle: Run, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    encoder = request.getfixturevalue(FIXTURE[bundle]) / "models" / "encoder.pt"
    knobs = {"pretrained_encoder": encoder, "freeze_encoder": True, "epochs": 1}
    run_bundle(downstream, "train", folder=tmp_path, **knobs)
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    prefix = "vit." if downstream == UNETR else "swinViT."
    source = torch.load(encoder, weights_only=True)["state_dict"]
    assert all(torch.equal(state[prefix + name], value) for name, value in source.items())


@pytest.mark.parametrize(
    ("bundle", "knobs", "message"),
    [
        (SIMMIM_VIT, {"decoder": "vae"}, "--decoder vae: expected linear or mlp or upsampling or transformer"),
        (
            SIMMIM_VIT,
            {"decoder": "transformer", "decoder_hidden_size": 20, "decoder_num_heads": 4},
            "--decoder_hidden_size 20: expected a multiple of 6",
        ),
        (
            SIMMIM_VIT,
            {"decoder": "upsampling", "roi_size": [12, 12, 12], "patch_size": 6},
            "--patch_size 6: with --decoder upsampling expected a power of two, the same along each axis",
        ),
        (SIMMIM_VIT, {"spacing_factor": 0}, "--spacing_factor 0"),
        (SIMMIM_VIT, {"mask_ratio": 1.0}, "--mask_ratio 1.0: expected a number from 0 to below 1"),
        (SIMMIM_SWIN, {"roi_size": [48, 32, 32]}, "--roi_size [48, 32, 32]: expected multiples of 32"),
        (SIMMIM_SWIN, {"mask_unit": 24}, "--roi_size [64, 32, 32] is not divisible by --mask_unit 24"),
        (SIMMIM_SWIN, {"mask_unit": 1}, "--mask_unit 1 is not a multiple of --patch_size 2"),
        (SIMMIM_SWIN, {"mask_unit": "big"}, "--mask_unit big: expected a whole number of voxels, or 3 for the axes"),
        (SIMMIM_SWIN, {"patch_size": 4}, "--patch_size 4: expected 2"),
        (SIMMIM_SWIN, {"num_heads": [1, 2, 5, 4]}, "which --num_heads [1, 2, 5, 4] must divide, number by number"),
        (SIMMIM_SWIN, {"depths": [1, 1, 1]}, "--depths [1, 1, 1]: expected 4 whole numbers of at least 1"),
        (SIMMIM_SWIN, {"feature_size": 10}, "--feature_size 10: expected a multiple of 12"),
    ],
)
def test_bad_knobs(
    bundle: str, knobs: dict, message: str, run_bundle: Run, tmp_path: Path, record_property: Callable
) -> None:
    with pytest.raises(SystemExit) as refused:
        run_bundle(bundle, "train", folder=tmp_path, **knobs)
    record_property("error", str(refused.value))
    assert message in str(refused.value)
    assert not (tmp_path / "output" / "checkpoint.pt").exists()
