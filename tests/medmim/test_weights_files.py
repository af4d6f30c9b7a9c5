"""Files that ``load_encoder`` must refuse: one line each, no code run, the network as it was."""

import io
import pickle
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer

from medmim.datasets import get_preset
from medmim.version import __version__
from medmim.weights import build_encoder, load_encoder, read_checkpoint, save_encoder, save_safetensors

SIZE = (16, 24, 8)
UNREADABLE = "not readable as a checkpoint of plain tensors"


def vit(channels=1, img_size=SIZE, patch_size=8, **arguments):
    sizes = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "spatial_dims": len(img_size)}
    return ViT(channels, img_size, patch_size, **sizes | arguments)


def swin(channels=1, **arguments):
    sizes = {"embed_dim": 12, "window_size": (3, 3), "patch_size": (2, 2), "depths": (1, 2, 1, 1), "spatial_dims": 2}
    return SwinTransformer(channels, **sizes | {"num_heads": (2, 3, 4, 6)} | arguments)


def encoder_pt(encoder, path, img_size=SIZE):
    save_encoder(path, encoder, img_size, get_preset("phantom"))


@pytest.fixture
def refused(tmp_path, record_property):
    """Loads a file, or what is to be saved as one, into a network; returns the one line of the error."""

    def refuse(network, content, name="w.pt", load=load_encoder, **options) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()} if network else {}
        with pytest.raises(ValueError, match=r".") as error:
            load(*([network] if network else []), path, **options)
        message = str(error.value)
        record_property("error", message)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert all(
            torch.equal(tensor, before[key]) for key, tensor in (network.state_dict() if network else {}).items()
        )
        return message.removeprefix(f"{path}: ")

    return refuse


def test_helper_that_nothing_is_refused_without_reason(tmp_path):
    """What the tests below change is what is refused."""
    for network, twin in ((vit(), vit()), (swin(), swin())):
        encoder_pt(twin, tmp_path / "encoder.pt", SIZE)
        assert len(load_encoder(network, tmp_path / "encoder.pt").loaded) == len(twin.state_dict())
        torch.save(twin.state_dict(), tmp_path / "w.pt")
        assert len(load_encoder(network, tmp_path / "w.pt").loaded) == len(twin.state_dict())


# -------------------------------------------------------------------------------------------------- other architectures


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_layers": 3}, "--num_layers 3"),
        ({"num_layers": 1}, "--num_layers 1"),
        ({"patch_size": 4}, "--patch_size 4"),
        ({"patch_size": (8, 4, 8)}, r'--patch_size "\[8, 4, 8\]"'),
        ({"hidden_size": 48}, "--hidden_size 48"),
        ({"mlp_dim": 64}, "--mlp_dim 64"),
        ({"qkv_bias": True}, "--qkv_bias True"),
        ({"img_size": (16, 24)}, "--patch_size 8"),
    ],
)
def test_another_vit(refused, tmp_path, arguments, told, described):
    other = vit(**arguments)
    if described:
        encoder_pt(other, tmp_path / "w.pt", arguments.get("img_size", SIZE))
    message = refused(vit(), None if described else other.state_dict())
    assert message.startswith("another architecture than the network's: ")
    knobs = set(told.replace("\\", "").split(" --"))
    assert knobs <= {*message.split("made with ")[1].split(" --")}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"depths": (1, 2, 2, 1)}, '--depths "[1, 2, 2, 1]"'),
        ({"depths": (1, 1, 1, 1)}, '--depths "[1, 1, 1, 1]"'),
        ({"patch_size": (4, 4)}, "--patch_size 4"),
        ({"embed_dim": 24}, "--feature_size 24"),
        ({"num_heads": (2, 3, 4, 4)}, '--num_heads "[2, 3, 4, 4]"'),
        ({"window_size": (5, 5)}, "--window_size 5"),
        ({"use_v2": True}, "--use_v2 True"),
        ({"patch_norm": True}, "--patch_norm True"),
        ({"qkv_bias": False}, "--qkv_bias False"),
    ],
)
def test_another_swin(refused, tmp_path, arguments, told, described):
    other = swin(**arguments)
    if described:
        encoder_pt(other, tmp_path / "w.pt")
    message = refused(swin(), None if described else other.state_dict())
    assert message.startswith("another architecture than the network's: ")
    assert message.endswith(f"The file was made with {told}")
    assert (
        f"{told.split()[0].removeprefix('--').replace('feature_size', 'embed_dim')} " in message.split("made with")[0]
    )


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        (
            vit,
            {"num_heads": 4},
            "network's: num_heads 4, expected 2. The file was made with --num_heads 4",
        ),
        (swin, {"downsample": "mergingv2"}, "network's: downsample mergingv2, expected merging. The"),
        (swin, {"mlp_ratio": 4.01}, "network's: mlp_ratio 4.01, expected 4.0. The"),
    ],
)
def test_what_no_shape_tells_is_told_by_the_description(refused, tmp_path, make, arguments, told):
    encoder_pt(make(**arguments), tmp_path / "w.pt")
    assert told in refused(make(), None)


def test_windows_of_the_same_size_but_another_shape(refused, tmp_path):
    """The tables of 3 × 5 and of 5 × 3 have the same shape; only the index into them differs."""
    network, other = swin(window_size=(3, 5)), swin(window_size=(5, 3))
    message = refused(network, other.state_dict())
    assert "relative_position_index holds other values than the network's" in message
    encoder_pt(other, tmp_path / "v.pt")
    assert 'made with --window_size "[5, 3]"' in refused(network, None, "v.pt")


def test_channels_without_a_rule(refused):
    message = refused(vit(4), vit(2).state_dict())
    assert (
        "patch_embedding.patch_embeddings.weight takes 2 channels, the network 4: take an encoder of 1 or as many "
        "channels (in Python, allow_new=['patch_embedding.patch_embeddings'] keeps the network's own)" in message
    )
    message = refused(swin(4), swin(2).state_dict())
    assert "(in Python, allow_new=['patch_embed.proj'] keeps" in message


def test_allowed_stem_does_not_excuse_another_patch_size(refused):
    message = refused(swin(4), swin(2, patch_size=(4, 4)).state_dict(), allow_new="patch_embed")
    assert "patch_embed.proj.weight is (12, 2, 4, 4), expected (12, 4, 2, 2)" in message


def test_another_kind_of_encoder(refused, tmp_path):
    message = refused(vit(), swin().state_dict())
    assert message == (
        "holds a SwinTransformer, but the network's encoder is a ViT: "
        "give a file of a ViT, or build the network with a SwinTransformer"
    )
    encoder_pt(vit(), tmp_path / "encoder.pt")
    assert refused(swin(), None, "encoder.pt").startswith("holds a ViT, but the network's encoder is a SwinTransformer")


def test_two_encoders(refused):
    names = vit().state_dict().items()
    two = {f"{prefix}.{name}": tensor for prefix in ("student", "teacher") for name, tensor in names}
    assert refused(vit(), two).startswith("holds 2 encoders (ViT at student., ViT at teacher.), expected one: save")
    both = {f"vit.{name}": tensor for name, tensor in names} | swin().state_dict()
    assert "holds 2 encoders (ViT at vit., SwinTransformer at the top)" in refused(vit(), both)


def test_missing_tensor_of_a_swin(refused):
    content = swin().state_dict()
    del content["layers2.0.blocks.1.mlp.linear1.bias"]
    message = refused(swin(), content)
    assert message.endswith("1 tensor does not fit, first: layers2.0.blocks.1.mlp.linear1.bias is missing.")


# ----------------------------------------------------------------------------------------------- no encoder, no tensors


def test_no_encoder(refused):
    timms, others = "patch_embed.proj.weight", "my_patch_embedding.position_embeddings"
    for content in ({name: torch.ones(3)} for name in ("conv.weight", timms, others)):
        message = refused(vit(), {"state_dict": content})
        assert message.startswith("0 tensors are named …patch_embedding.position_embeddings (ViT) or …layers1.0.")
        assert message.endswith("…stages.0.0.depthwise.weight (ConvViT): give a file that holds a ViT")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.ones(3), {"model": {"a": 1}}, "weights"])
def test_no_state_dict(refused, content):
    message = refused(vit(), content)
    assert message.startswith("holds no state dict (looked at top level and under state_dict, model, network): save")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"network": {}, "epoch": 3}])
def test_empty_state_dict(refused, content):
    assert refused(vit(), content) == "its state dict is empty: save it again, from network.state_dict()"


def test_missing_file(refused):
    assert refused(vit(), None) == "no such file: train first, or correct the path"


# ----------------------------------------------------------------------------------------------------- unreadable files


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_is_not_run(refused, tmp_path):
    bomb = Bomb(tmp_path / "bang")
    message = refused(vit(), {"state_dict": vit().state_dict(), "bomb": bomb})
    assert message == (
        f"{UNREADABLE} (it holds the Python object io.open, and code is never run): "
        "save its state dict alone and give that file"
    )
    assert refused(vit(), pickle.dumps(bomb)).startswith(f"{UNREADABLE} (")
    assert refused(vit(), pickle.dumps(bomb, 2)).startswith(f"{UNREADABLE} (it holds the Python object ")
    assert not (tmp_path / "bang").exists()
    pickle.loads(pickle.dumps(bomb)).close()
    assert (tmp_path / "bang").exists()


def test_options_of_a_training_script_are_passed_over(refused, tmp_path):
    """Many scripts save their ``args`` beside the weights; code inside is refused as anywhere else."""
    plain = Namespace(lr=1e-4, sizes=[1, (2, None)], name="a", nested=Namespace(amp=True), more={"a": -1})
    for form in ("zip", "legacy"):
        (tmp_path / "args.pt").write_bytes(in_form(form, {"model": vit().state_dict(), "args": plain}))
        assert len(load_encoder(vit(), tmp_path / "args.pt").loaded) == 31
    for number, options in enumerate(
        (Namespace(a=Bomb(tmp_path / "bang")), Namespace(a=Namespace(b=[Bomb(tmp_path / "bang")])))
    ):
        message = refused(vit(), {"model": vit().state_dict(), "args": options}, f"{number}.pt")
        assert message == (
            f"{UNREADABLE} (it holds the Python object io.open, and code is never run): "
            "save its state dict alone and give that file"
        )
    assert not (tmp_path / "bang").exists()


def test_reading_changes_nothing_of_what_torch_may_load(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "args": Namespace(a=1)}, tmp_path / "w.pt")
    read_checkpoint(tmp_path / "w.pt")
    assert Namespace not in torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([Namespace]):
        read_checkpoint(tmp_path / "w.pt")
        assert Namespace in torch.serialization.get_safe_globals()


def test_options_of_a_training_script_are_read_by_several_threads_at_once(tmp_path):
    torch.save({"a": torch.ones(2), "args": [Namespace(a=1) for _ in range(300)]}, tmp_path / "w.pt")
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: "a" in read_checkpoint(tmp_path / "w.pt")[0], range(80)))


def test_whole_modules_and_numpy_values(refused):
    assert "(it holds the Python object monai.networks.nets.vit.ViT, and code is never run)" in refused(vit(), vit())
    message = refused(vit(), {"state_dict": vit().state_dict(), "best": np.float64(0.5)})
    assert "multiarray.scalar, and code is never run): save its state dict alone" in message


def test_torchscript(refused, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    assert refused(vit(), None) == (
        f"{UNREADABLE} (a TorchScript archive): save torch.jit.load(path).state_dict() and give that file"
    )


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html>\n<html><title>Sign in</title>", b"\n <html>", b"<?xml version='1.0'?>"]
)
def test_web_page(refused, page):
    told = "(a web page, as a failed download leaves one): get it again, from the address of the file itself"
    assert refused(vit(), page) == f"{UNREADABLE} {told}"
    assert refused(vit(), page, "w.safetensors") == f"{UNREADABLE} {told}"


def test_git_lfs_pointer(refused):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 245\n"
    assert refused(vit(), pointer) == f"{UNREADABLE} (a pointer of Git LFS): git lfs pull fetches the file"


@pytest.mark.parametrize(
    "content", [b"weights", b"\x80\x02]", b"\x80\x02N0abc.", b"\x1f\x8b" + bytes(40), bytes(8) + b"{"]
)
def test_file_of_another_kind(refused, content):
    assert refused(vit(), content).startswith(f"{UNREADABLE} (")


def in_form(form: str, content: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_file(refused, tmp_path, form, share):
    if form == "safetensors":
        save_safetensors(tmp_path / "whole", vit().state_dict())
        whole = (tmp_path / "whole").read_bytes()
    else:
        whole = in_form(form, {"state_dict": vit().state_dict()})
    (tmp_path / "whole").write_bytes(whole)
    assert len(load_encoder(vit(), tmp_path / "whole").loaded) == 31
    message = refused(vit(), whole[: int(len(whole) * share)], "w.safetensors" if form == "safetensors" else "w.pt")
    assert message.startswith(f"{UNREADABLE} (")
    assert message.endswith("): get it again")
    assert "(truncated or damaged" in message or share == 0


# ------------------------------------------------------------------------------------------------------- other versions


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format_version": 99, "medmim_version": "9.0"}, "format version 99 (written by medmim 9.0)"),
        ({"format_version": 0, "medmim_version": "0.0.3"}, "format version 0 (written by medmim 0.0.3)"),
        ({"format_version": None, "medmim_version": "0.0.2"}, "format version missing (written by medmim 0.0.2)"),
    ],
)
@pytest.mark.parametrize("load", [load_encoder, build_encoder])
def test_other_format_versions(refused, tmp_path, load, changes, told):
    encoder_pt(vit(), tmp_path / "encoder.pt")
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    content["description"] |= changes
    if changes["format_version"] is None:
        del content["description"]["format_version"]
    message = refused(vit() if load is load_encoder else None, content, load=load)
    writer = changes["medmim_version"]
    advice = "update medmim" if writer == "9.0" else f"train again, or use it with medmim {writer}"
    assert message == f"{told}, this is medmim {__version__}, which reads version 1: {advice}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda network: network.clear(),
            "its description lacks the network's name or arguments, or the preset: train",
        ),
        (
            lambda network: network.pop("arguments"),
            "its description lacks the network's name or arguments, or the preset: train",
        ),
        (lambda network: network.update(name="Swan"), "its description makes no network (description of an unknown"),
        (
            lambda network: network["arguments"].update(colour=3),
            "its description makes no network (ViT.__init__() got an",
        ),
        (
            lambda network: network["arguments"].pop("img_size"),
            "its description makes no network (ViT.__init__() missing",
        ),
    ],
)
def test_spoilt_description(refused, tmp_path, change, told):
    encoder_pt(vit(), tmp_path / "encoder.pt")
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    change(content["description"]["network"])
    assert refused(None, content, load=build_encoder).startswith(told)


def test_description_without_a_preset(refused, tmp_path):
    encoder_pt(vit(), tmp_path / "encoder.pt")
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    del content["description"]["preset"]
    assert refused(vit(), content).endswith("lacks the network's name or arguments, or the preset: train again")


def test_description_without_a_grid(refused, tmp_path):
    encoder_pt(vit(), tmp_path / "encoder.pt")
    content = torch.load(tmp_path / "encoder.pt", weights_only=True)
    del content["description"]["network"]["arguments"]["img_size"]
    assert refused(vit(), content) == "its description lacks img_size or patch_size: train again"


def test_file_that_may_not_be_read(refused, tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"x")

    def open_closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", open_closed)
    assert refused(vit(), None) == "cannot be read (Permission denied): check its permissions"


def test_reading_gives_tensors_only(tmp_path):
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "w.pt")
    assert list(read_checkpoint(tmp_path / "w.pt")[0]) == ["a"]
