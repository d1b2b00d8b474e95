import contextlib
import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import (
    AdapterBankError,
    BackboneMismatch,
    Conflict,
    InvalidPackage,
    MissingPart,
    NonFiniteTensor,
    TensorMismatch,
    UnsafePath,
)
from adapters.families.base import BlipDims
from adapters.package import (
    CONFIG_FILE,
    FILES,
    KnownDigests,
    check_backbone,
    copy_package,
    expected_shapes,
    files_digest,
    is_finite,
    pack_tar,
    parse_package,
    read_files,
    read_package,
    read_probe,
    tensors_digest,
    unpack_tar,
    write_package,
)

WIDTH, LAYERS, EMBED_DIM = 8, 2, 6
DIMS = BlipDims(WIDTH, LAYERS, EMBED_DIM)
PARTS = {"vision": f"sha256:{1:064x}", "text_encoder": f"sha256:{2:064x}"}


def make_config(**changes: object) -> AdapterConfig:
    fields: dict[str, object] = {
        "family": "uniadapter",
        "task": "retrieval",
        "rank": 3,
        "heads": ["vision_proj", "itm_head"],
        "backbone": {"architecture": "blip", "width": WIDTH, "layers": LAYERS, "parts": PARTS},
        "preprocessing": {"resolution": 32},
        "provenance": {"source": "a test"},
    }
    return AdapterConfig.parse(json.dumps(fields | changes))


def make_tensors(config: AdapterConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(config, DIMS).items()}


def make_package(path: Path, readme: str = "# A test\n", **changes: object) -> Path:
    config = make_config(**changes)
    write_package(
        path, config, make_tensors(config), readme, {"pixels": torch.ones(1, 3), "ids": torch.tensor([[1, 2]])}
    )
    return path


def rewrite(path: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file behind the package's back."""
    tensors = safetensors.torch.load((path / file).read_bytes())
    change(tensors)
    (path / file).write_bytes(safetensors.torch.save(tensors))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    config = make_config(rank=5, decoding={"answers": ["ja", "naïve"]})
    tensors = make_tensors(config)
    written = write_package(tmp_path / "new" / "p", config, tensors, "# Höhe\n", {"x": torch.ones(2)})
    read = read_package(tmp_path / "new" / "p", dims=DIMS)
    assert read.path == written.path == tmp_path / "new" / "p"
    assert read.config == written.config == config
    assert (read.weights_digest, read.package_digest) == (written.weights_digest, written.package_digest)
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[name], tensors[name]) for name in tensors)
    assert (tmp_path / "new" / "p" / "README.md").read_text(encoding="utf-8") == "# Höhe\n"
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["p"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    config = make_config(provenance={"b": 1, "a": {"d": 1, "c": 2}})
    twin = make_config(provenance={"a": {"c": 2, "d": 1}, "b": 1})
    tensors = make_tensors(config)
    backwards = {name: tensors[name].t().contiguous().t() for name in reversed(tensors)}  # other order, other strides
    write_package(tmp_path / "one", config, tensors, "x", {"a": torch.ones(1), "b": torch.ones(2)})
    write_package(tmp_path / "two", twin, backwards, "x", {"b": torch.ones(2), "a": torch.ones(1)})
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")


def test_tensors_that_share_memory_or_need_gradients_are_written(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    shared = torch.randn(WIDTH, requires_grad=True)
    tensors["adapters.0.up_proj.bias"] = tensors["adapters.1.up_proj.bias"] = shared
    package = write_package(tmp_path / "p", config, tensors, "", None)
    assert torch.equal(package.tensors["adapters.1.up_proj.bias"], shared)
    assert not package.tensors["adapters.1.up_proj.bias"].requires_grad


def test_the_probe_is_optional_and_readable(tmp_path: Path) -> None:
    config = make_config()
    write_package(tmp_path / "without", config, make_tensors(config), "", None)
    assert read_probe(tmp_path / "without") is None
    probe = read_probe(make_package(tmp_path / "with"))
    assert probe is not None
    assert torch.equal(probe["ids"], torch.tensor([[1, 2]]))


def test_a_taken_target_is_left_alone(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    before = read_files(package)
    with pytest.raises(Conflict):
        make_package(package, rank=4)
    assert read_files(package) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Conflict):
        make_package(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Conflict):
        make_package(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    make_package(tmp_path / "empty")
    assert {entry.name for entry in tmp_path.iterdir()} == {"p", "file", "link", "empty"}


@pytest.mark.parametrize("what", ["missing", "nan", "dtype", "probe"])
def test_nothing_invalid_is_written(tmp_path: Path, what: str) -> None:
    config = make_config()
    tensors, probe = make_tensors(config), {"x": torch.ones(2)}
    if what == "missing":
        del tensors["itm_head.bias"]
    elif what == "nan":
        tensors["itm_head.bias"][0] = float("nan")
    elif what == "dtype":
        tensors["itm_head.bias"] = torch.ones(2, dtype=torch.complex128)
    else:
        probe["x"][0] = float("inf")
    with pytest.raises((TensorMismatch, NonFiniteTensor)):
        write_package(tmp_path / "p", config, tensors, "", probe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_a_required_file_is_missing(tmp_path: Path, file: str) -> None:
    package = make_package(tmp_path / "p")
    (package / file).unlink()
    with pytest.raises(InvalidPackage, match=f"missing: {file}"):
        read_package(package)


@pytest.mark.parametrize("file", ["adapter_model.bin", "evil.pkl", ".hidden", "readme.md", "probe.safetensors~"])
def test_any_other_file_is_refused(tmp_path: Path, file: str) -> None:
    package = make_package(tmp_path / "p")
    (package / file).write_bytes(b"")
    with pytest.raises(InvalidPackage, match="unexpected") as caught:
        read_package(package)
    assert caught.value.param == file


@pytest.mark.parametrize("file", FILES)
def test_only_regular_files_are_read(tmp_path: Path, file: str) -> None:
    package = make_package(tmp_path / "p")
    (package / file).rename(tmp_path / "outside")
    (package / file).symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePath, match=file):
        read_package(package)
    (package / file).unlink()
    (package / file).mkdir()
    with pytest.raises(UnsafePath, match=file):
        read_package(package)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidPackage, match="cannot read"):
        read_package(tmp_path / "nothing")
    with pytest.raises(InvalidPackage, match="missing"):
        read_package(tmp_path)


def test_missing_and_unexpected_tensors_are_named_but_not_all(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    rewrite(package, "adapter_model.safetensors", lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(9)}))
    with pytest.raises(TensorMismatch, match=r"unexpected: extra\.0, extra\.1, .*extra\.4 and 4 more"):
        read_package(package)
    package = make_package(tmp_path / "q")
    rewrite(package, "adapter_model.safetensors", lambda t: t.pop("adapters.1.down_proj.bias"))
    with pytest.raises(TensorMismatch, match=r"missing: adapters\.1\.down_proj\.bias"):
        read_package(package)


def test_the_config_decides_which_tensors_there_must_be(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    changes: list[tuple[dict[str, object], str]] = [
        ({"rank": 4}, "of the wrong shape: .*3x8 instead of 4x8"),
        ({"heads": []}, r"unexpected: itm_head\.bias, itm_head\.weight, vision_proj"),
        ({"heads": ["vision_proj", "text_proj", "itm_head"]}, r"missing: text_proj\.bias, text_proj\.weight"),
        ({"options": {"visual": False}}, "unexpected: .*visual_up_proj"),
    ]
    for change, match in changes:
        (package / "adapter_config.json").write_text(make_config(**change).model_dump_json())
        with pytest.raises(TensorMismatch, match=match):
            read_package(package)


@pytest.mark.parametrize("name", ["vision_proj.weight", "itm_head.weight", "adapters.0.up_proj.weight"])
@pytest.mark.parametrize("shape", [(), (0, 8), (8, 8, 1), (7, 5)])
def test_a_wrong_shape_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    package = make_package(tmp_path / "p")
    rewrite(package, "adapter_model.safetensors", lambda t: t.update({name: torch.zeros(shape)}))
    with pytest.raises(TensorMismatch, match=name):
        read_package(package)
    with pytest.raises(TensorMismatch, match=name):
        read_package(package, dims=DIMS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_allowed(tmp_path: Path, dtype: torch.dtype) -> None:
    config = make_config()
    tensors = {name: tensor.to(dtype) for name, tensor in make_tensors(config).items()}
    write_package(tmp_path / "p", config, tensors, "", None)
    assert {tensor.dtype for tensor in read_package(tmp_path / "p", dims=DIMS).tensors.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    package = make_package(tmp_path / "p")
    rewrite(package, "adapter_model.safetensors", lambda t: t.update({"itm_head.bias": torch.ones(2).to(dtype)}))
    with pytest.raises(TensorMismatch, match=r"itm_head\.bias " + str(dtype).removeprefix("torch.")):
        read_package(package)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    package = make_package(tmp_path / "p")
    rewrite(package, "adapter_model.safetensors", lambda t: t["adapters.1.up_proj.weight"][3].fill_(value))
    with pytest.raises(NonFiniteTensor, match=r"adapters\.1\.up_proj\.weight"):
        read_package(package)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 65, 4097])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    extremes = torch.tensor(
        [torch.finfo(dtype).min, torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0], dtype=dtype
    )
    assert is_finite(tensor)
    assert is_finite(torch.cat([tensor, extremes]))
    for index in {0, size // 2, size - 1}:
        for value in (float("nan"), float("inf"), -float("inf")):
            spoilt = tensor.clone()
            spoilt[index] = value
            assert not is_finite(spoilt)
            assert not is_finite(torch.cat([extremes, spoilt]).view(1, -1, 1).expand(2, -1, 3))


@pytest.mark.parametrize("tensor", [torch.empty(0, 3), torch.tensor([True]), torch.tensor([2**31], dtype=torch.int64)])
def test_nothing_and_integers_are_finite(tensor: Tensor) -> None:
    assert is_finite(tensor)


def test_the_probe_is_checked_too(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    rewrite(package, "probe.safetensors", lambda t: t["pixels"].fill_(float("nan")))
    with pytest.raises(NonFiniteTensor, match="pixels"):
        read_package(package)
    rewrite(package, "probe.safetensors", lambda t: t.update(pixels=torch.ones(1, dtype=torch.float64)))
    with pytest.raises(TensorMismatch, match="pixels"):
        read_probe(package)
    (package / "probe.safetensors").write_bytes(b"?")
    with pytest.raises(InvalidPackage, match="probe"):
        read_package(package)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "probe.safetensors"])
def test_damaged_files_are_refused_and_raise_nothing_else(tmp_path: Path, file: str) -> None:
    package = make_package(tmp_path / "p")
    data = (package / file).read_bytes()
    chance = random.Random(0)
    for size in [0, 1, 7, 8, 9, len(data) // 2, len(data) - 3]:
        (package / file).write_bytes(data[:size])
        with pytest.raises(InvalidPackage):
            read_package(package)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[chance.randrange(min(len(data), 2000))] = chance.randrange(256)
        (package / file).write_bytes(damaged)
        with contextlib.suppress(AdapterBankError):
            read_package(package)


def test_a_dtype_torch_does_not_know_is_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (package / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InvalidPackage, match="not a readable safetensors file"):
        read_package(package)


def test_family_options_and_heads_must_be_known(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    changes: list[tuple[dict[str, object], str]] = [
        ({"family": "prefix"}, "unknown adapter family 'prefix'"),
        ({"options": {"colour": True}}, "colour"),
        ({"heads": ["vision_proj", "lm_head"]}, "unknown head 'lm_head'"),
        ({"heads": ["vision_proj", "vision_proj", "itm_head"]}, "listed twice"),
    ]
    for change, match in changes:
        (package / "adapter_config.json").write_text(make_config(**change).model_dump_json())
        with pytest.raises(InvalidPackage, match=match):
            read_package(package)


def test_a_config_cannot_make_us_count_for_ever(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    config = json.loads((package / "adapter_config.json").read_text())
    config["backbone"]["layers"] = 10**9
    (package / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidPackage, match=r"backbone\.layers"):
        read_package(package)


def test_pixels_are_not_divided_by_nothing(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    config = json.loads((package / "adapter_config.json").read_text())
    config["preprocessing"]["std"] = [0.2, 0.0, 0.2]
    (package / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidPackage, match=r"preprocessing\.pixels\.std"):
        read_package(package)


def test_sizes_of_the_backbone(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    read_package(package, dims=DIMS)
    with pytest.raises(BackboneMismatch, match="width 8 with 2 layers, not width 16 with 2"):
        read_package(package, dims=replace(DIMS, width=16))
    with pytest.raises(BackboneMismatch):
        read_package(package, dims=replace(DIMS, layers=3))
    with pytest.raises(TensorMismatch, match=r"vision_proj\.weight 6x8 instead of 7x8"):
        read_package(package, dims=replace(DIMS, embed_dim=7))


def test_both_projection_heads_must_agree_without_a_backbone_too(tmp_path: Path) -> None:
    config = make_config(heads=["vision_proj", "text_proj"])
    tensors = make_tensors(config)
    write_package(tmp_path / "p", config, tensors, "", None)
    tensors["text_proj.weight"] = torch.zeros(EMBED_DIM + 1, WIDTH)
    with pytest.raises(TensorMismatch, match=r"text_proj\.weight 7x8 instead of 6x8"):
        write_package(tmp_path / "q", config, tensors, "", None)


def test_every_part_the_adapter_names_must_be_the_backbones() -> None:
    config = make_config()
    check_backbone(config, PARTS | {"decoder": f"sha256:{3:064x}"})
    with pytest.raises(MissingPart, match="text_encoder"):
        check_backbone(config, {"vision": PARTS["vision"]})
    with pytest.raises(BackboneMismatch, match="'vision'") as caught:
        check_backbone(config, PARTS | {"vision": f"sha256:{9:064x}"})
    assert caught.value.param == "vision"


def test_model_card_provenance_and_probe_leave_the_weights_digest_alone(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    one = write_package(tmp_path / "1", config, tensors, "one", None)
    others = [
        write_package(tmp_path / "2", config, tensors, "two", None),
        write_package(tmp_path / "3", config, tensors, "one", {"x": torch.ones(1)}),
        write_package(tmp_path / "4", make_config(provenance={"source": "elsewhere"}), tensors, "one", None),
    ]
    assert {other.weights_digest for other in others} == {one.weights_digest}
    assert len({one.package_digest, *(other.package_digest for other in others)}) == 4


def test_whatever_changes_numbers_changes_the_weights_digest(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    nudged = tensors | {"itm_head.bias": tensors["itm_head.bias"] + 1e-6}
    half = {name: tensor.half() for name, tensor in tensors.items()}
    variants = [
        (config, tensors),
        (config, nudged),
        (config, half),
        (make_config(preprocessing={"resolution": 48}), tensors),
        (make_config(max_text_tokens=30), tensors),
        (make_config(decoding={"num_beams": 4}), tensors),
        (make_config(options={"query_residual": False}), tensors),
    ]
    digests = {
        write_package(tmp_path / str(i), config, tensors, "", None).weights_digest
        for i, (config, tensors) in enumerate(variants)
    }
    assert len(digests) == len(variants)


def test_the_tensor_digest_depends_on_names_dtypes_shapes_and_bytes_only() -> None:
    base = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(5.0)}
    digest = tensors_digest(base)
    frames = [
        b'["a", "float32", [2, 2]]',
        struct.pack("<4f", 1, 2, 3, 4),
        b'["b", "float32", []]',
        struct.pack("<f", 5),
    ]
    framed = b"".join(struct.pack("<Q", len(frame)) + frame for frame in frames)
    assert digest == f"sha256:{hashlib.sha256(framed).hexdigest()}"  # galleries keep it: it must never change
    strided = torch.tensor([[1.0, 3.0], [2.0, 4.0]], requires_grad=True).t()
    assert tensors_digest({"b": base["b"], "a": strided}) == digest
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].flatten(), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"].t(), "b": base["b"]},
        {"a": base["a"]},
        {"a": base["a"], "b": -base["b"]},
        {},
    ]
    assert len({digest, *map(tensors_digest, others)}) == len(others) + 1
    assert tensors_digest({"x": torch.empty(0, 3), "y": torch.tensor([True]), "z": torch.ones(1, dtype=torch.bfloat16)})


def test_the_file_digest_cannot_be_shifted_between_names_and_contents() -> None:
    assert files_digest({"ab": b"c"}) != files_digest({"a": b"bc"})
    assert files_digest({"a": b"x", "b": b"y"}) == files_digest({"b": b"y", "a": b"x"})
    assert files_digest({"a": b"xy", "b": b""}) != files_digest({"a": b"x", "b": b"y"})


def test_copy(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    copy_package(package, tmp_path / "copy")
    assert read_package(tmp_path / "copy").package_digest == read_package(package).package_digest
    with pytest.raises(Conflict):
        copy_package(package, tmp_path / "copy")
    (package / "extra").write_text("")
    with pytest.raises(InvalidPackage):
        copy_package(package, tmp_path / "other")


def packed(package: Path) -> bytes:
    stream = io.BytesIO()
    pack_tar(package, stream)
    return stream.getvalue()


def make_tar(members: list[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.PAX_FORMAT) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    stream.seek(0)
    return stream


def file_members(package: Path, prefix: str = "") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(tarfile.TarInfo(prefix + name), data) for name, data in read_files(package).items()]


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_a_tar_holds_the_package_and_always_the_same_bytes(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    data = packed(package)
    unpack_tar(io.BytesIO(data), tmp_path / "q", max_bytes=len(data))
    assert read_package(tmp_path / "q").package_digest == read_package(package).package_digest
    assert packed(tmp_path / "q") == data


@pytest.mark.parametrize("prefix", ["", "./", "my adapter/", "./x/"])
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_common_tools_are_read(tmp_path: Path, prefix: str, kind: int) -> None:
    package = make_package(tmp_path / "p")
    folder = [special(prefix, tarfile.DIRTYPE)] if prefix else []
    unpack_tar(make_tar(folder + file_members(package, prefix), kind), tmp_path / "q", max_bytes=10**6)
    assert read_files(tmp_path / "q") == read_files(package)


@pytest.mark.parametrize(
    "member",
    [
        special("README.md", tarfile.SYMTYPE, "/etc/passwd"),
        special("README.md", tarfile.LNKTYPE, "adapter_config.json"),
        special("README.md", tarfile.CHRTYPE),
        special("README.md", tarfile.FIFOTYPE),
        special("README.md", tarfile.DIRTYPE),
        special("x/README.md", tarfile.DIRTYPE),
        (tarfile.TarInfo("/README.md"), b""),
        (tarfile.TarInfo("../README.md"), b""),
        (tarfile.TarInfo("x/../../README.md"), b""),
        (tarfile.TarInfo("..\\README.md"), b""),
        (tarfile.TarInfo("x/y/README.md"), b""),
        (tarfile.TarInfo("x/README.md"), b""),
        (tarfile.TarInfo("adapter_model.bin"), b""),
    ],
    ids=lambda member: f"{member[0].name}-{member[0].type.decode()}",
)
@pytest.mark.parametrize("first", [True, False])
def test_members_that_are_not_a_packages_are_refused(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes], first: bool
) -> None:
    members = [m for m in file_members(make_package(tmp_path / "p")) if m[0].name != "README.md"]
    stream = make_tar([member, *members] if first else [*members, member])
    with pytest.raises(InvalidPackage):
        unpack_tar(stream, tmp_path / "in" / "q", max_bytes=10**6)
    assert not (tmp_path / "in").exists()


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    members = file_members(make_package(tmp_path / "p"))
    with pytest.raises(InvalidPackage, match=r"README\.md is in the tar twice"):
        unpack_tar(make_tar([*members, (tarfile.TarInfo("./README.md"), b"x")]), tmp_path / "q", max_bytes=10**6)


def test_links_devices_and_escapes_are_unsafe_paths(tmp_path: Path) -> None:
    for member in [special("README.md", tarfile.SYMTYPE, "x"), (tarfile.TarInfo("../README.md"), b"")]:
        with pytest.raises(UnsafePath):
            unpack_tar(make_tar([member]), tmp_path / "q", max_bytes=10**6)


def test_a_tar_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        num_bytes = 0

        def read(self, size: int = -1) -> bytes:
            self.num_bytes += size
            return header.ljust(size, b"\0") if self.num_bytes == size else b"\0" * size

    huge = tarfile.TarInfo("README.md")
    huge.size = 2**33 - 1
    header = huge.tobuf(tarfile.USTAR_FORMAT)
    stream = Endless()
    with pytest.raises(InvalidPackage, match="larger than 100000 bytes"):
        unpack_tar(stream, tmp_path / "q", max_bytes=100_000)  # type: ignore[arg-type]
    assert stream.num_bytes < 200_000


def test_a_tar_of_countless_members_is_refused(tmp_path: Path) -> None:
    members = [special("x", tarfile.DIRTYPE) for _ in range(1000)]
    with pytest.raises(InvalidPackage, match="more members"):
        unpack_tar(make_tar(members), tmp_path / "q", max_bytes=10**9)


def test_a_tar_that_pretends_a_sparse_file_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("README.md")
    member.pax_headers = {"GNU.sparse.size": str(2**40), "GNU.sparse.map": "0,0"}
    with pytest.raises(UnsafePath):
        unpack_tar(make_tar([(member, b"x")]), tmp_path / "q", max_bytes=10**6)


def test_an_incomplete_tar_is_refused(tmp_path: Path) -> None:
    data = packed(make_package(tmp_path / "p"))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size  # what follows is padding
    for size in [*range(0, end, 97), end - 1]:
        with pytest.raises(InvalidPackage):
            unpack_tar(io.BytesIO(data[:size]), tmp_path / "q", max_bytes=10**6)
    assert not (tmp_path / "q").exists()


def test_a_damaged_tar_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    data = packed(make_package(tmp_path / "p"))
    chance = random.Random(0)
    for index in range(150):
        damaged = bytearray(data)
        start = chance.randrange(0, len(data), 512)  # mostly headers
        for _ in range(chance.randrange(1, 4)):
            damaged[min(start + chance.randrange(512), len(data) - 1)] = chance.randrange(256)
        with contextlib.suppress(InvalidPackage):
            unpack_tar(io.BytesIO(damaged), tmp_path / str(index), max_bytes=10**6)
    assert any(tmp_path.iterdir())


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(make_package(tmp_path / "p"), "p")
    stream.seek(0)
    with pytest.raises(InvalidPackage, match="not a readable tar"):
        unpack_tar(stream, tmp_path / "q", max_bytes=10**6)


def test_unpacking_leaves_a_taken_target_alone(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    with pytest.raises(Conflict):
        unpack_tar(io.BytesIO(packed(package)), package, max_bytes=10**6)


def test_what_is_known_of_files_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the numbers is checked as ever."""
    package = read_package(make_package(tmp_path / "package"))
    files = read_files(tmp_path / "package")
    known = KnownDigests(package.package_digest, package.weights_digest)
    monkeypatch.setattr("adapters.package.hashlib", None)
    again = parse_package(files, known=known)
    assert (again.package_digest, again.weights_digest) == (package.package_digest, package.weights_digest)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in package.tensors.items())
    with pytest.raises(InvalidPackage):
        parse_package({**files, CONFIG_FILE: b"{}"}, known=known)
