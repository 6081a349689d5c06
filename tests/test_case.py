"""Cases: what may be asked for, how it is written down, and that the tensors are what was asked for."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effattn import layout as layouts
from effattn import options, values
from effattn.case import CAUSAL, DTYPES, Case
from effattn.errors import RequestError

SMALL: dict[str, Any] = {"q_len": 4, "kv_len": 6, "head_dim": 8, "dtype": "fp16"}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 4))
    suffixes = draw(st.lists(st.sampled_from(tuple(layouts.SUFFIXES)), unique=True))
    return Case(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        q_len=draw(st.integers(0, 9)),
        kv_len=draw(st.integers(0, 9)),
        head_dim=draw(st.integers(1, 9)),
        v_dim=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.sampled_from(CAUSAL)),
        scale=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        layout="+".join([draw(st.sampled_from(layouts.ORDERS)), *suffixes]),
        values=draw(st.sampled_from(values.names())),
        seed=draw(st.integers(0, 2**63 - 1)),
        window=draw(st.none() | st.integers(0, 9) | st.tuples(st.integers(-1, 9), st.integers(-1, 9))),
        softcap=draw(st.none() | st.floats(1.0, 50.0)),
        alibi=draw(st.sampled_from(options.ALIBI)),
        bias=draw(st.sampled_from(("none", "bhqk", "qk", "bk:fp32"))),
        mask=draw(st.sampled_from(("none", "bhqk", "qk", "bk"))),
        sinks=draw(st.booleans()),
        lengths=draw(st.sampled_from(options.LENGTHS)),
        dropout=draw(st.sampled_from((0.0, 0.1))),
        backward=draw(st.booleans()),
    )


@given(case=cases())
def test_json_gives_the_case_back(case: Case) -> None:
    again = Case.from_json(case.to_json())
    assert again == case
    assert again.id == case.id
    assert again.to_json() == case.to_json()
    assert Case.from_dict(case.to_dict()) == case


def test_json_has_what_differs_from_the_defaults() -> None:
    case = Case(heads=4, kv_heads=2, **SMALL)
    assert case.to_json() == (
        '{"schema":1,"heads":4,"kv_heads":2,"q_len":4,"kv_len":6,"head_dim":8,"dtype":"fp16"}'
    )
    assert json.loads(Case(**SMALL).to_json()).keys() == {"schema", *SMALL}


def test_the_id_is_the_same_on_every_machine() -> None:
    """Ids are in stored runs and in what people send each other."""
    assert Case(**SMALL).id == "65cb0280f7ba"
    assert Case(heads=4, kv_heads=2, scale=0.5, causal="top-left", seed=7, **SMALL).id == "30f1570369e7"


def test_the_id_differs_where_any_field_does() -> None:
    changes: list[dict[str, Any]] = [
        {"batch": 2}, {"heads": 2}, {"heads": 2, "kv_heads": 1}, {"q_len": 5}, {"kv_len": 5}, {"head_dim": 9},
        {"v_dim": 7}, {"dtype": "bf16"}, {"causal": "top-left"}, {"scale": 0.5}, {"layout": "bshd"},
        {"values": "uniform"}, {"seed": 1}, {"window": (3, -1)}, {"softcap": 20.0}, {"alibi": "drawn"}, {"bias": "qk"},
        {"mask": "qk"}, {"sinks": True}, {"lengths": "kv"}, {"dropout": 0.25}, {"backward": True},
    ]  # fmt: skip
    made = [Case(**SMALL), *(Case(**{**SMALL, **change}) for change in changes)]
    assert len({case.id for case in made}) == len(made)
    assert {name for change in changes for name in change} == set(Case.__dataclass_fields__)


def test_what_means_the_same_is_the_same() -> None:
    case = Case(heads=2, **SMALL)
    assert Case(heads=2, kv_heads=2, v_dim=8, scale=8**-0.5, **SMALL) == case
    assert Case(heads=2, kv_heads=2, v_dim=8, scale=1 / math.sqrt(8), **SMALL).id == case.id
    assert Case(layout="bhsd+offset+pad", **SMALL) == Case(layout="bhsd+pad+offset", **SMALL)
    assert type(Case(scale=2, **SMALL).scale) is float
    assert case.softmax_scale == pytest.approx(8**-0.5, rel=1e-15)
    assert Case(scale=-0.25, **SMALL).softmax_scale == -0.25
    assert Case(window=3, **SMALL) == Case(window=(3, 3), **SMALL) == Case(window=[3, 3], **SMALL)
    assert Case(window=-1, **SMALL) == Case(window=(-1, -1), **SMALL) == Case(**SMALL)
    assert Case(bias="qk:fp32", **{**SMALL, "dtype": "fp32"}) == Case(bias="qk", **{**SMALL, "dtype": "fp32"})
    assert Case(bias="qk:fp32", **SMALL) != Case(bias="qk", **SMALL)


def test_the_description_has_all_that_is_unusual() -> None:
    assert Case(**SMALL).describe() == "fp16, batch 1, 1 head, 4x6, d=8, normal seed 0"
    case = Case(
        batch=2, heads=4, kv_heads=2, v_dim=3, causal="top-left", scale=0.5, layout="bshd", values="one-hot",
        seed=5, **SMALL,
    )  # fmt: skip
    assert case.describe() == (
        "fp16, batch 2, 4 heads (2 kv), 4x6, d=8 v_dim=3, causal top-left, scale 0.5, layout bshd,"
        " one-hot seed 5"
    )
    case = Case(
        window=(3, -1), softcap=20, alibi="geometric", bias="hqk:fp32", mask="bk", sinks=True, lengths="both",
        dropout=0.1, backward=True, **SMALL,
    )  # fmt: skip
    assert case.describe() == (
        "fp16, batch 1, 1 head, 4x6, d=8, window 3,all, softcap 20, alibi geometric, bias hqk:fp32, mask bk, sinks,"
        " lengths, dropout 0.1, backward, normal seed 0"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_len": -1}, "q_len -1: expected an integer from 0 to"),
        ({"kv_len": 1.0}, r"kv_len 1\.0: expected an integer from 0"),
        ({"kv_len": "6"}, "kv_len '6': expected an integer from 0"),
        ({"q_len": True}, "q_len True: expected an integer from 0 to 2147483647, not true or false"),
        ({"head_dim": 0}, "head_dim 0: expected an integer from 1"),
        ({"head_dim": 2**31}, "head_dim 2147483648: expected an integer from 1 to 2147483647"),
        ({"v_dim": 0}, "v_dim 0: expected"),
        ({"batch": 0}, "batch 0: expected"),
        ({"heads": 0}, "heads 0: expected"),
        ({"heads": 3, "kv_heads": 2}, "heads 3 with kv_heads 2: expected heads to be a multiple"),
        ({"heads": 2, "kv_heads": 4}, "heads 2 with kv_heads 4: expected heads to be a multiple"),
        ({"seed": -1}, "seed -1: expected an integer from 0"),
        ({"seed": 2**63}, "seed 9223372036854775808: expected"),
        ({"dtype": "fp8"}, "dtype 'fp8': expected one of fp16, bf16, fp32"),
        ({"dtype": 16}, "dtype 16: expected one of fp16, bf16, fp32"),
        ({"dtype": ["fp16"]}, r"dtype \['fp16'\]: expected one of"),
        ({"causal": True}, "causal True: expected one of none, bottom-right, top-left"),
        ({"causal": "bottom"}, "causal 'bottom': expected one of none"),
        ({"scale": math.nan}, "scale nan: expected a finite number"),
        ({"scale": -math.inf}, "scale -inf: expected a finite number"),
        ({"scale": 10**400}, "scale inf: expected a finite number"),
        ({"scale": True}, "scale True: expected a number"),
        ({"scale": "0.5"}, "scale '0.5': expected a number"),
        ({"layout": "bhs"}, "layout 'bhs': 'bhs' is not an order of axes"),
        ({"layout": "bhss"}, "layout 'bhss': 'bhss' is not an order"),
        ({"layout": "bhsd+pda"}, "unknown suffix 'pda'.*Did you mean 'pad'"),
        ({"layout": "bhsd+pad+pad"}, "the suffix 'pad' is given twice"),
        ({"layout": "bhsd+"}, "unknown suffix ''"),
        ({"layout": None}, "layout None: expected a text"),
        ({"values": "nromal"}, "values 'nromal' is unknown.*Did you mean 'normal'"),
        ({"values": 3}, "values 3: expected a text"),
        ({"window": (1, 2, 3)}, r"window \(1, 2, 3\): expected two numbers of keys \(left, right\)"),
        ({"window": (1, -2)}, r"window \(1, -2\): expected two"),
        ({"window": 1.5}, r"window 1\.5: expected two"),
        ({"window": True}, "window True: expected two"),
        ({"softcap": 0}, "softcap 0: expected a positive number"),
        ({"softcap": math.inf}, "softcap inf: expected a positive"),
        ({"alibi": True}, "alibi True: expected one of none, geometric, drawn"),
        ({"bias": "kq"}, "bias 'kq': expected 'none', or some of the letters b, h, q, k in this order"),
        ({"bias": "qk:fp8"}, "bias 'qk:fp8': expected 'none'.*perhaps with :fp32"),
        ({"bias": ""}, "bias '': expected 'none'"),
        ({"mask": "qk:fp32"}, "mask 'qk:fp32': expected 'none'"),
        ({"sinks": 1}, "sinks 1: expected true or false"),
        ({"lengths": "q"}, "lengths 'q': expected one of none, kv, both"),
        ({"dropout": 1.0}, r"dropout 1\.0: expected a probability"),
        ({"backward": None}, "backward None: expected true or false"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Case(**{**SMALL, **change})


GOOD = '{"schema":1,"q_len":4,"kv_len":6,"head_dim":8,"dtype":"fp16"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("hello", "not JSON .*'hello'"),
        ("[1, 2]", "given as an array: expected a JSON object"),
        ("null", "given as null"),
        ("true", "given as true"),
        ('"case"', "given as a text"),
        ("17", "given as a number"),
        ("{}", 'no schema: expected "schema": 1'),
        (GOOD.replace('"schema":1', '"schema":true'), "with schema True"),
        (GOOD.replace('"schema":1', '"schema":"1"'), "with schema '1'"),
        (GOOD.replace('"schema":1', '"schema":0'), "with schema 0"),
        (GOOD.replace('"schema":1', '"schema":2'), "schema 2: this effattn reads schema 1. A newer effattn"),
        (GOOD.replace('"q_len"', '"q_length"'), "unknown field 'q_length': expected only batch, heads"),
        (GOOD.replace('"q_len":4,', ""), "without q_len: expected at least q_len, kv_len, head_dim, dtype"),
        (GOOD.replace("4", "4.0"), r"q_len 4\.0: expected an integer"),
        (GOOD.replace("4", "true"), "q_len True: expected an integer"),
        (GOOD.replace("4", "null"), "q_len null: expected a value"),
        (GOOD.replace("4", "NaN"), "the number NaN: expected finite numbers"),
        (GOOD.replace("4", "9" * 5000), "not JSON"),
        (GOOD.replace("}", ',"scale":-Infinity}'), "the number -Infinity"),
        (GOOD.replace("}", ',"scale":1e999}'), "scale inf: expected a finite number"),
        (GOOD.replace("}", ',"kv_heads":2}'), "heads 1 with kv_heads 2"),
        (GOOD.replace("}", ',"q_len":5}'), "field 'q_len' given twice"),
        ("[" * 50_000, "not JSON"),
        (GOOD + GOOD, "not JSON"),
    ],
)
def test_a_bad_case_is_refused_with_one_message(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        Case.from_json(text)
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=f"(?s)case file .*case.json: .*{message}"):
        Case.load(path)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_case_cut_off_anywhere_is_refused(length: int) -> None:
    with pytest.raises(RequestError, match="is not JSON"):
        Case.from_json(GOOD[:length])


def test_a_file_gives_its_case(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(GOOD + "\n")
    assert Case.load(path) == Case.load(str(path)) == Case(**SMALL)


def test_a_file_that_is_no_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.json: there is no such file"):
        Case.load(tmp_path / "absent.json")
    with pytest.raises(RequestError, match="this is a directory"):
        Case.load(tmp_path)
    path = tmp_path / "case"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(RequestError, match="not text in UTF-8"):
        Case.load(path)
    path.write_bytes(pickle.dumps({"schema": 1}))
    with pytest.raises(RequestError, match="not text in UTF-8"):
        Case.load(path)
    path.write_bytes(b" " * 100_000)
    with pytest.raises(RequestError, match="longer than 65536 bytes"):
        Case.load(path)
    with pytest.raises(RequestError, match="cannot be read"):
        Case.load(path / "below" / "a" / "file.json")
    with pytest.raises(RequestError, match="cannot be read"):
        Case.load(f"{path}\0")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_rights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(GOOD)
    path.chmod(0)
    with pytest.raises(RequestError, match=r"cannot be read \(Permission denied\)"):
        Case.load(path)


SHAPE: dict[str, Any] = {
    "batch": 2, "heads": 6, "kv_heads": 3, "q_len": 4, "kv_len": 5, "head_dim": 8, "v_dim": 7, "seed": 3
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", layouts.ORDERS)
@pytest.mark.parametrize("suffixes", ["", "+pad", "+step", "+offset", "+pad+step+offset"])
def test_a_layout_changes_the_memory_and_not_the_values(dtype: str, order: str, suffixes: str) -> None:
    plain = Case(dtype=dtype, **SHAPE).tensors()
    tensors = Case(dtype=dtype, layout=order + suffixes, **SHAPE).tensors()
    for x, expected in zip(tensors, plain, strict=True):
        assert x.dtype == expected.dtype
        assert x.shape == expected.shape
        assert torch.equal(x, expected)
        in_memory = [x.stride("bhsd".index(axis)) for axis in order]
        assert in_memory == sorted(in_memory, reverse=True)
        assert in_memory[-1] == (2 if "step" in suffixes else 1)
        packed = math.prod(x.shape["bhsd".index(axis)] for axis in order[1:])
        assert (in_memory[0] > packed * in_memory[-1]) == ("pad" in suffixes)
        if "pad" not in suffixes:
            aligned = x.data_ptr() % 16 == 0
            assert aligned == ("offset" not in suffixes)
        _assert_surrounded_by_nan(x)


def _assert_surrounded_by_nan(x: torch.Tensor) -> None:
    """All of the memory behind x is NaN but for its elements, and there is some at both ends."""
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    elements = torch.as_strided(memory, x.shape, x.stride(), x.storage_offset())
    assert not elements.isnan().any()
    assert memory[:64].isnan().all()
    assert memory[-64:].isnan().all()
    elements.fill_(math.nan)
    assert memory.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["b", "h", "s"])
@pytest.mark.parametrize("rest", ["bhsd", "sdhb", "bshd+pad+step+offset"])
@pytest.mark.parametrize("name", values.names())
def test_an_expanded_axis_has_stride_0_in_k_and_v(dtype: str, axis: str, rest: str, name: str) -> None:
    q, k, v = Case(dtype=dtype, layout=f"{rest}+expand-{axis}", values=name, **SHAPE).tensors()
    i = "bhsd".index(axis)
    assert q.stride(i) != 0
    for x, last in ((k, 8), (v, 7)):
        assert x.shape == (2, 3, 5, last)
        assert x.stride(i) == 0
        assert torch.equal(x, x.narrow(i, 0, 1).expand_as(x))
        _assert_surrounded_by_nan(x)


def test_several_axes_may_be_expanded() -> None:
    _, k, v = Case(dtype="bf16", layout="bhsd+expand-b+expand-h+expand-s", **SHAPE).tensors()
    assert k.stride() == v.stride() == (0, 0, 0, 1)
    assert len(k[0, 0, 0].unique()) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", values.names())
def test_every_distribution_can_be_empty(dtype: str, lengths: tuple[int, int], name: str) -> None:
    q_len, kv_len = lengths
    for suffix in ("", "+pad+step", "+expand-s"):
        case = Case(q_len=q_len, kv_len=kv_len, head_dim=3, dtype=dtype, values=name, layout="bshd" + suffix)
        q, k, v = case.tensors()
        assert q.shape == (1, 1, q_len, 3)
        assert k.shape == v.shape == (1, 1, kv_len, 3)


def test_tensors_are_fresh_each_time() -> None:
    case = Case(**SMALL)
    first = case.tensors()
    first.k.fill_(0)
    second = case.tensors()
    assert second.k.any()
    assert second.k.untyped_storage().data_ptr() != first.k.untyped_storage().data_ptr()


def test_seeds_and_tensors_differ() -> None:
    a, b = Case(**SHAPE, dtype="fp32"), Case(**{**SHAPE, "seed": 4}, dtype="fp32")
    assert not torch.equal(a.tensors().q, b.tensors().q)
    q, k, v = Case(q_len=64, kv_len=64, head_dim=8, dtype="fp32").tensors()
    assert len(torch.cat([q, k, v]).unique()) == 3 * 64 * 8


def test_no_device_is_refused() -> None:
    with pytest.raises(RequestError, match=r"device 'gpu' is unknown\. Expected cpu, or cuda"):
        Case(**SMALL).tensors("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(RequestError, match="device 'cuda': torch finds no usable GPU"):
        Case(**SMALL).tensors("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_on_a_gpu_lie_in_memory_as_on_the_cpu(dtype: str) -> None:
    case = Case(dtype=dtype, layout="bshd+pad+step+offset+expand-h", **SHAPE)
    for here, there in zip(case.tensors(), case.tensors("cuda"), strict=True):
        assert there.is_cuda
        assert there.stride() == here.stride()
        assert torch.equal(there.cpu(), here)
        _assert_surrounded_by_nan(there)


def test_a_case_too_large_for_the_memory_is_refused() -> None:
    case = Case(q_len=2**31 - 1, kv_len=4, head_dim=2**31 - 1, dtype="fp16")
    with pytest.raises(RequestError, match="don't fit into the memory"):
        case.tensors()


#: all options at once, with several entries, heads and tiles
FULL: dict[str, Any] = {
    "batch": 3, "heads": 6, "kv_heads": 2, "q_len": 40, "kv_len": 90, "head_dim": 8, "v_dim": 7, "window": (30, -1),
    "softcap": 20.0, "alibi": "drawn", "bias": "hqk", "mask": "bqk", "sinks": True, "lengths": "both", "dropout": 0.1,
    "backward": True, "layout": "bshd+pad+step", "seed": 3,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_options_come_with_their_tensors(dtype: str) -> None:
    case = Case(dtype=dtype, **FULL)
    q, k, v = inputs = case.tensors()
    extras = inputs.extras
    assert {name: tuple(x.shape) for name, x in extras.present().items()} == {
        "alibi_slopes": (3, 6), "bias": (1, 6, 40, 90), "mask": (3, 1, 40, 90), "sinks": (6,), "q_lengths": (3,),
        "kv_lengths": (3,), "d_out": (3, 6, 40, 7), "d_lse": (3, 6, 40),
    }  # fmt: skip
    assert extras.bias is not None
    assert extras.d_out is not None
    assert extras.d_out.dtype == extras.bias.dtype == q.dtype
    assert extras.d_out.stride(3) == extras.bias.stride(3) == 2
    _assert_surrounded_by_nan(extras.d_out)
    plain = Case(
        **{**FULL, "dtype": dtype, "backward": False, "bias": "none", "sinks": False, "layout": "bhsd"}
    )
    # An option changes neither q, k and v nor what the other options draw.
    for x, expected in zip((q, k, v), plain.tensors(), strict=True):
        assert torch.equal(x, expected)
    for name, x in plain.tensors().extras.present().items():
        assert torch.equal(x, extras.present()[name])
    assert plain.tensors().extras.d_out is None
    assert Case(**{**FULL, "dtype": dtype, "bias": "qk:fp32"}).tensors().extras.bias.dtype == torch.float32  # type: ignore[union-attr]


def test_masks_hide_rows_and_stretches_of_keys_and_lengths_reach_both_ends() -> None:
    rows, stretches, ends = 0, 0, set()
    for seed in range(8):
        extras = Case(**{**FULL, "dtype": "fp16", "seed": seed, "q_len": 64, "kv_len": 200}).tensors().extras
        assert extras.mask is not None
        assert extras.q_lengths is not None
        assert extras.kv_lengths is not None
        rows += int((~extras.mask.any(-1)).sum())
        # A whole tile of 64 keys that one row doesn't see, though it sees others.
        tiles = extras.mask.unfold(-1, 64, 1).any(-1)
        stretches += int((~tiles).any(-1).logical_and(extras.mask.any(-1)).sum())
        ends |= {*extras.q_lengths.tolist()} & {0, 64}
        assert 200 in extras.kv_lengths
        assert 0 in extras.kv_lengths
    assert rows > 20
    assert stretches > 200
    assert ends == {0, 64}


def test_slopes_follow_the_geometric_rule() -> None:
    """The figures of the paper: 1/2 to 1/256 for 8 heads; for 12, those of 8 and four of those of 16."""
    assert options.geometric_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert options.geometric_slopes(12) == [2.0**-i for i in range(1, 9)] + [
        2.0 ** (-i / 2) for i in (1, 3, 5, 7)
    ]
    slopes = Case(**{**FULL, "dtype": "fp32", "alibi": "geometric"}).tensors().extras.alibi_slopes
    assert slopes is not None
    assert slopes.tolist()[:4] == [0.25, 0.0625, 0.015625, 0.00390625]
