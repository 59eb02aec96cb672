"""Types built from fragments: types of Python, dataclasses and unions, by the conventions of serde; their errors."""

import abc
import collections
import collections.abc
import dataclasses
import datetime as dt
import enum
import re
import types
import typing
import uuid
from dataclasses import KW_ONLY, InitVar, dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, NewType, Optional, TypeVar

import later_annotations
import numpy as np
import numpy.typing as npt
import pytest
import vmsnap
from vmsnap.serialization import decode, encode

T = TypeVar("T")
U = TypeVar("U")
NOON = dt.datetime(2013, 3, 21, 20, 4, tzinfo=dt.UTC)
ID = uuid.UUID("0123456789abcdef0123456789abcdef")
FORMATS: tuple[Any, ...] = ("cbor", "json")


@dataclass
class Segment:
    base: int
    limit: int = 0xFFFF


@dataclass
class Regs:
    gdt: list[Segment]
    cr3: int | None
    by_name: dict[str, Segment] = field(default_factory=dict)
    raw: bytes = b""


@dataclass
class Cpu:
    regs: Regs
    flags: list[bool] = field(default_factory=list)


@dataclass(kw_only=True, frozen=True, slots=True)
class Frozen:
    a: int
    b: str = "x"


@dataclass
class Renamed:
    kind: str = field(metadata={"name": "type"})
    size: int = 0


@dataclass
class Base:
    a: int


@dataclass
class Derived(Base):
    b: Segment
    count: ClassVar[int] = 5


@dataclass
class WithInit:
    a: int
    seed: InitVar[int]
    _: KW_ONLY
    scale: InitVar[int] = 2
    b: int = field(init=False)

    def __post_init__(self, seed: int, scale: int) -> None:
        self.b = seed * scale


@dataclass
class Box(Generic[T]):
    content: T
    more: dict[str, list[T]] = field(default_factory=dict)


@dataclass
class Crate(Box[int], Generic[T]):
    """Its variable is another one than that of its base, though of the same name."""

    label: T | None = None


class Partial(typing.TypedDict, total=False):
    a: typing.Required[int]
    part: Segment


class Whole(typing.TypedDict):
    a: int
    b: typing.NotRequired[str]


class Point(NamedTuple):
    x: int
    part: Segment
    z: int = 5


class Colour(enum.Enum):
    RED = "red"
    ONE = 1
    PAIR = (1, 2)


class Listed(enum.Enum):
    LIST = [1, 2]  # noqa: RUF012
    BYTES = b"ab"


@dataclass
class Base1:
    """Knows one of the keys of `Segment`."""

    base: int
    other: int = 0


class Access(enum.IntFlag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    LOW = 1


CpuId = NewType("CpuId", int)


@dataclass
class Unit: ...


@dataclass
class Wrapper:
    """A newtype, as ``struct Wrapper(u64)``."""

    inner: int


@dataclass
class MapWrapper:
    inner: dict[str, int]


@dataclass
class Chain:
    next: Optional["Chain"]


@dataclass
class Disk:
    kind: Literal["disk"]
    size: int


@dataclass
class Net:
    kind: Literal["net"]
    mac: str


@dataclass
class Node:
    """Each level is for a union to tell."""

    kids: "list[Node | Leaf | int]"


@dataclass
class Leaf:
    value: int


class Alias:
    """Stands in for ``type Nested = dict[str, Nested] | list[Nested] | int``, which Python 3.11 cannot read."""

    @property
    def __value__(self) -> Any:
        return dict[str, self] | list[self] | int  # type: ignore[valid-type]


NESTED = Alias()

Item = TypeVar("Item")


class ListOf:
    """Stands in for ``type ListOf[Item] = list[Item]``, and `LIST_OF_SEGMENTS` for ``ListOf[Segment]``."""

    __type_params__ = (Item,)
    __value__ = list[Item]


LIST_OF_SEGMENTS = types.GenericAlias(ListOf, (Segment,))


def built(value: Any, type: Any, format: Any = "cbor") -> Any:
    return decode(encode(value, format=format), type, format=format)


# Built types ----------------------------------------------------------------------------------------------------------

SEGMENT = {"base": 1, "limit": 2}

BUILT: list[tuple[Any, Any, Any]] = [
    # value, type, result
    (True, bool, True),
    (2**70, int, 2**70),
    ([SEGMENT], LIST_OF_SEGMENTS, [Segment(1, 2)]),
    (1.5, float, 1.5),
    (1, float, 1.0),
    ("é", str, "é"),
    (None, type(None), None),
    ([], type(None), None),
    ({}, type(None), None),
    ([1, "a", None], Any, [1, "a", None]),
    ({"a": 1}, object, {"a": 1}),
    (1, Annotated[int, ["unhashable"]], 1),
    (1, Final[int], 1),
    (1, CpuId, 1),
    ("a", Literal["a", 1], "a"),
    # bytes: serde writes a Vec<u8> as a list
    (b"ab", bytes, b"ab"),
    ([97, 98], bytes, b"ab"),
    ([], bytes, b""),
    (b"ab", bytearray, bytearray(b"ab")),
    (np.array([97, 98], "u1"), bytes, b"ab"),
    # texts
    (ID, uuid.UUID, ID),
    (str(ID), uuid.UUID, ID),
    (NOON, dt.datetime, NOON),
    ("2013-03-21T20:04:00Z", dt.datetime, NOON),
    (dt.date(2013, 3, 21), dt.date, dt.date(2013, 3, 21)),
    ("/a/é", Path, Path("/a/é")),
    ("/a", PurePosixPath, PurePosixPath("/a")),
    # collections
    ([1], list, [1]),
    ([[1], []], list[list[int]], [[1], []]),
    ([1, 2], tuple, (1, 2)),
    ([1, 2], tuple[int, ...], (1, 2)),
    ([1, "a"], tuple[int, str], (1, "a")),
    ([], tuple[()], ()),
    ({1, 2}, set[int], {1, 2}),
    ([1, 2], set, {1, 2}),
    ({(1, 2)}, set[tuple[int, int]], {(1, 2)}),
    ({1, 2}, frozenset[int], frozenset({1, 2})),
    ({1, 2}, list[int], [1, 2]),
    ([SEGMENT], collections.deque[Segment], collections.deque([Segment(1, 2)])),
    ([1], collections.abc.Sequence[int], [1]),
    ({1}, collections.abc.Set[int], {1}),
    ([1], typing.List[int], [1]),  # noqa: UP006
    (np.array([[1, 2]]), list[list[int]], [[1, 2]]),
    (np.array([1, 2]), tuple[int, int], (1, 2)),
    # maps; in JSON all keys are texts
    ({"a": 1}, dict, {"a": 1}),
    ({"a": SEGMENT}, dict[str, Segment], {"a": Segment(1, 2)}),
    ({1: 2, -3: 4, 2**70: 5}, dict[int, int], {1: 2, -3: 4, 2**70: 5}),
    ({True: 1, False: 2}, dict[bool, int], {True: 1, False: 2}),
    ({"1": 2, "true": 3}, dict[str, int], {"1": 2, "true": 3}),
    ({"1.5": 1, "-1e3": 2}, dict[float, int], {1.5: 1, -1000.0: 2}),
    ({"1": 2}, dict[str | int, int], {"1": 2}),
    ({Level.LOW: 1}, dict[Level, int], {Level.LOW: 1}),
    ({"LOW": 1}, dict[Level, int], {Level.LOW: 1}),
    ({Colour.RED: 1, Colour.ONE: 2}, dict[Colour, int], {Colour.RED: 1, Colour.ONE: 2}),
    ({ID: 1}, dict[uuid.UUID, int], {ID: 1}),
    ({"/a": 1}, dict[Path, int], {Path("/a"): 1}),
    ({"b": 1, "a": 2}, collections.OrderedDict[str, int], collections.OrderedDict(b=1, a=2)),
    ({"a": 1}, collections.abc.Mapping[str, int], {"a": 1}),
    # enums
    ("red", Colour, Colour.RED),
    ("RED", Colour, Colour.RED),
    (1, Colour, Colour.ONE),
    (Colour.PAIR, Colour, Colour.PAIR),
    (3, Access, Access.READ | Access.WRITE),
    ([1, 2], Listed, Listed.LIST),
    (b"ab", Listed, Listed.BYTES),
    (Segment(1, 2), Base1 | Segment, Segment(1, 2)),
    ({"base": 1, "newer": 2}, Base1 | Segment, Base1(1)),
    ("READ", Access, Access.READ),
    # dataclasses
    (SEGMENT, Segment, Segment(1, 2)),
    ({"base": 1}, Segment, Segment(1)),
    ({"base": 1, "newer": [2]}, Segment, Segment(1)),
    ([1, 2], Segment, Segment(1, 2)),
    ([1], Segment, Segment(1)),
    ({"gdt": [SEGMENT], "cr3": 5}, Regs, Regs([Segment(1, 2)], 5)),
    ({"gdt": []}, Regs, Regs([], None)),
    ({"gdt": [], "by_name": {"cs": {"base": 1}}, "raw": [1]}, Regs, Regs([], None, {"cs": Segment(1)}, b"\1")),
    ({"regs": {"gdt": [[3]]}, "flags": [True]}, Cpu, Cpu(Regs([Segment(3)], None), [True])),
    ({"a": 1}, Frozen, Frozen(a=1)),
    ([1, "y"], Frozen, Frozen(a=1, b="y")),
    ({"type": "data", "size": 3}, Renamed, Renamed("data", 3)),
    ({"a": 1, "b": SEGMENT}, Derived, Derived(1, Segment(1, 2))),
    ({"content": 1, "more": {"k": [2]}}, Box[int], Box(1, {"k": [2]})),
    ({"content": SEGMENT, "more": {"k": [SEGMENT]}}, Box[Segment], Box(Segment(1, 2), {"k": [Segment(1, 2)]})),
    ({"content": {"content": SEGMENT}}, Box[Box[Segment]], Box(Box(Segment(1, 2)))),
    ({"content": "any"}, Box, Box("any")),
    ({"content": 1, "label": SEGMENT}, Crate[Segment], Crate(1, {}, Segment(1, 2))),
    (
        {"name": "a", "children": [{"name": "b"}], "parent": {"name": "c"}},
        later_annotations.Tree,
        later_annotations.Tree("a", [later_annotations.Tree("b")], later_annotations.Tree("c")),
    ),
    ({"scale": 2, "value": 3}, later_annotations.Scaled, later_annotations.Scaled(scale=2, value=3)),
    ({"one": 1, "other": [2]}, later_annotations.Pair[int], later_annotations.Pair(1, [2])),
    # typed dicts and named tuples
    ({"a": 1, "z": 2}, Whole, {"a": 1}),
    ({"a": 1, "part": SEGMENT}, Partial, {"a": 1, "part": Segment(1, 2)}),
    ([1, SEGMENT], Point, Point(1, Segment(1, 2))),
    ({"x": 1, "part": SEGMENT, "z": 3}, Point, Point(1, Segment(1, 2), 3)),
    # units and newtypes
    (None, Unit, Unit()),
    ([], Unit, Unit()),
    ({}, Unit, Unit()),
    (5, Wrapper, Wrapper(5)),
    ({"inner": 5}, Wrapper, Wrapper(5)),
    ({"a": 5}, MapWrapper, MapWrapper({"a": 5})),
    ({"inner": {"a": 5}}, MapWrapper, MapWrapper({"a": 5})),
    ({"next": {"next": None}}, Chain, Chain(Chain(None))),
    ({}, Chain, Chain(None)),
    ({"newer": 1}, Chain, Chain(None)),
    # unions
    (None, int | None, None),
    (1, int | None, 1),
    (5, Leaf | int, 5),
    (5, Leaf | str, Leaf(5)),
    ("a", int | str | None, "a"),
    (2**53 + 1, float | int, 2**53 + 1),
    (2**53 + 2, float, float(2**53 + 2)),
    (0.5, float | int, 0.5),
    ([1], int | list[int], [1]),
    ({"Segment": SEGMENT}, Segment | Wrapper, Segment(1, 2)),
    ({"Wrapper": 5}, Segment | Wrapper, Wrapper(5)),
    ("Unit", Segment | Unit, Unit()),
    ({"Unit": None}, Segment | Unit, Unit()),
    (["Unit", {"Segment": [7]}], list[Segment | Unit], [Unit(), Segment(7)]),
    ({"inner": 3}, Segment | Wrapper, Wrapper(3)),
    ({"x": 3}, Segment | MapWrapper, MapWrapper({"x": 3})),
    (5, Segment | Wrapper, Wrapper(5)),
    ({"kind": "net", "mac": "m"}, Disk | Net, Net("net", "m")),
    ({"kind": "disk", "size": 1}, Disk | Net | None, Disk("disk", 1)),
    ({"a": [1, {"b": 2}]}, NESTED, {"a": [1, {"b": 2}]}),
    # numpy
    (5, np.int64, np.int64(5)),
    (1.5, np.float32, np.float32(1.5)),
    ("a", np.str_, np.str_("a")),
]


@pytest.mark.parametrize(("value", "type", "expected"), BUILT, ids=lambda part: None)
@pytest.mark.parametrize("format", FORMATS)
def test_a_type_is_built_from_both_formats(value: Any, type: Any, expected: Any, format: Any) -> None:
    result = built(value, type, format)
    assert (result, result.__class__) == (expected, expected.__class__)


def test_what_was_written_of_a_type_is_built_again() -> None:
    cpu = Cpu(Regs([Segment(1), Segment(2, 3)], 5, {"cs": Segment(4)}, b"\0\xff"), [True, False])
    for format in FORMATS:
        assert built(cpu, Cpu, format) == cpu
        assert built([cpu, None], list[Cpu | None], format) == [cpu, None]
        assert built(Box([NOON, ID, Colour.PAIR]), Box[tuple[dt.datetime, uuid.UUID, Colour]], format) == Box(
            (NOON, ID, Colour.PAIR)
        )


def test_arguments_of_the_constructor_alone_are_read_and_what_it_does_not_take_is_not() -> None:
    made = built({"a": 1, "seed": 3, "b": 99}, WithInit)
    assert (made.a, made.b) == (1, 6)
    assert built({"a": 1, "seed": 3, "scale": 5}, WithInit).b == 15
    with pytest.raises(vmsnap.CorruptSnapshotError, match="WithInit needs 'seed'"):
        built({"a": 1}, WithInit)


def test_an_indefinite_map_is_a_flattened_struct() -> None:
    assert decode(bytes.fromhex("bf646261736501656c696d697402ff"), Segment) == Segment(1, 2)


ARRAYS: list[tuple[Any, Any, str]] = [
    ([1, 2], np.ndarray, "int64"),
    ([[1.5], [2]], np.ndarray, "float64"),
    ([True], npt.NDArray[np.bool_], "bool"),
    ([1, 2], npt.NDArray[np.uint8], "uint8"),
    ([1, 2], npt.NDArray[np.float64], "float64"),
    ([2**60, -(2**53)], npt.NDArray[np.float64], "float64"),
    ([0.1], npt.NDArray[np.float32], "float32"),
    ([], npt.NDArray[np.uint16], "uint16"),
    ([1, 2], npt.NDArray[Any], "int64"),
    ([1.5], npt.NDArray[np.floating], "float64"),
    ([2**63], npt.NDArray[np.uint64], "uint64"),
    (np.array([[1, 2]], ">u2"), np.ndarray, ">u2"),
    (np.array([[1, 2]], ">u2"), npt.NDArray[np.uint8], "uint8"),
    (np.array([1.5], "<f4"), npt.NDArray[np.floating], "float32"),
]


@pytest.mark.parametrize(("value", "type", "dtype"), ARRAYS)
def test_arrays_are_built_of_typed_arrays_and_of_lists(value: Any, type: Any, dtype: str) -> None:
    array = built(value, type)
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, np.asarray(value, dtype))


@pytest.mark.parametrize(
    ("value", "type"),
    [
        ([300], npt.NDArray[np.uint8]),
        (np.array([300]), npt.NDArray[np.uint8]),
        ([-1], npt.NDArray[np.uint64]),
        (np.array([-1]), npt.NDArray[np.uint64]),
        ([1.5], npt.NDArray[np.int64]),
        ([1.0], npt.NDArray[np.int64]),
        ([1e300], npt.NDArray[np.float32]),
        ([2**53 + 1], npt.NDArray[np.float64]),
        (np.array([2**63 + 1], "u8"), npt.NDArray[np.float64]),
        ([2**24 + 1], npt.NDArray[np.float32]),
        (2**24 + 1, np.float32),
        ([1], npt.NDArray[np.floating]),
        (["12"], npt.NDArray[np.int64]),
        ([True], npt.NDArray[np.int64]),
        ([None], npt.NDArray[np.float64]),
        ([1, "a"], np.ndarray),
        ([[1], [1, 2]], np.ndarray),
        ([2**70], np.ndarray),
        ([{}], np.ndarray),
        (5, np.ndarray),
        (300, np.uint8),
        (1.5, np.int64),
        ("5", np.int64),
        ([1], np.int64),
    ],
)
def test_numbers_do_not_become_others_in_arrays(value: Any, type: Any) -> None:
    with pytest.raises(vmsnap.CorruptSnapshotError, match=r"expected (an array of |u?int|float)"):
        built(value, type)


# Callables -----------------------------------------------------------------------------------------------------------


def test_a_callable_gets_the_value(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    writer.write_fragment("cpu", {"a": [1, 2]})
    reader = vmsnap.SnapshotReader(tmp_path / "vm1")
    assert reader.read_fragment("cpu", lambda value: value["a"][1]) == 2
    assert reader.read_fragment("cpu", dict.keys) == {"a"}
    assert built({"1.5": ["2"]}, dict[Decimal, list[Fraction]]) == {Decimal("1.5"): [Fraction(2)]}


@dataclass
class Positive:
    value: int

    def __post_init__(self) -> None:
        if self.value < 0:
            raise ValueError("mine")


def test_what_a_callable_or_constructor_raises_is_passed_on_with_the_fragment_s_name(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1").add_namespace("vcpus")
    writer.write_fragment("0", [{"value": -1}])
    reader = vmsnap.SnapshotReader(tmp_path / "vm1").namespace("vcpus")

    def failing(_: Any) -> Any:
        raise KeyError("mine")

    kinds: list[tuple[Any, type[Exception]]] = [
        (failing, KeyError),
        (list[Positive], ValueError),
        (lambda v: v.x, AttributeError),
    ]
    for kind, error in kinds:
        with pytest.raises(error, match=r"mine|no attribute") as caught:
            reader.read_fragment("0", kind)
        (note,) = caught.value.__notes__
        assert "vcpus" in note
        assert re.search(r"\b0\b", note)


# Values of other types ------------------------------------------------------------------------------------------------

MISMATCHES: list[tuple[Any, Any, str]] = [
    ({"regs": {"gdt": [{"base": 1}, {"base": "hunter2"}]}}, Cpu, "at regs.gdt[1].base: expected int, found str"),
    ({"regs": {"gdt": [], "by_name": {"hunter2": 5}}}, Cpu, "at regs.by_name[key 0]: expected a map for Segment"),
    ({"regs": {"gdt": []}, "flags": ["hunter2"]}, Cpu, "at flags[0]: expected bool, found str"),
    ({"flags": []}, Cpu, "Cpu needs 'regs', which is missing"),
    ({"regs": {"gdt": [{}]}}, Cpu, "at regs.gdt[0]: Segment needs 'base', which is missing"),
    ({"hunter2": 1}, Segment, "Segment needs 'base', which is missing"),
    ({"hunter2": 1}, Wrapper, "Wrapper needs 'inner', which is missing"),
    ([1, 2, 3], Segment, "expected a map for Segment, found list"),
    (None, Segment, "expected a map for Segment, found nothing (null)"),
    ("hunter2", Segment, "expected a map for Segment, found str"),
    ({"z": 1}, Whole, "Whole needs 'a', which is missing"),
    (True, int, "expected int, found bool"),
    (1.0, int, "expected int, found float"),
    (1, bool, "expected bool, found int"),
    (True, float, "expected float, found bool"),
    (2**53 + 1, float, "expected float, found int"),
    ("hunter2", float, "expected float, found str"),
    ("1", int, "expected int, found str"),
    (1, str, "expected str, found int"),
    (0, type(None), "expected null, found int"),
    ("hunter2", type(None), "expected null, found str"),
    ("hunter2", bytes, "expected bytes, found str"),
    ([256], bytes, "expected bytes, found list"),
    ([-1], bytes, "expected bytes, found list"),
    ([True], bytes, "expected bytes, found list"),
    (5, bytes, "expected bytes, found int"),
    ("hunter2", uuid.UUID, "expected UUID, found str"),
    ("hunter2", dt.datetime, "expected datetime, found str"),
    ("hunter2", dt.date, "expected date, found str"),
    (5, Path, "expected Path, found int"),
    ("hunter2", Colour, "expected a value or name of Colour, found str"),
    (True, Colour, "expected a value or name of Colour, found bool"),
    (1.0, Level, "expected a value or name of Level, found float"),
    ("hunter2", Literal["a", 1], "expected one of 'a', 1, found str"),
    (True, Literal[1], "expected one of 1, found bool"),
    ("hunter2", list[str], "expected a list, found str"),
    ({"hunter2": 1}, list, "expected a list, found dict"),
    ([1, "hunter2"], list[int], "at [1]: expected int, found str"),
    ([1], tuple[int, str], "expected a list of 2, found a list of 1"),
    (5, tuple[int, str], "expected a list of 2, found int"),
    ([1, 2], tuple[int, str], "at [1]: expected str, found int"),
    ([["hunter2"]], set, "a map key or set member is a list, which is not hashable"),
    ([1], dict, "expected a map, found list"),
    ({"hunter2": 1}, dict[int, int], "at [key 0]: expected int, found str"),
    ({"01": 1}, dict[int, int], "at [key 0]: expected int, found str"),
    ({"-": 1}, dict[int, int], "at [key 0]: expected int, found str"),
    ({"1" * 1000: 1}, dict[int, int], "at [key 0]: expected int, found str"),
    ({"LOW": 1, "1": 2}, dict[Level, int], "two keys of a map are equal"),
    ({"content": "hunter2"}, Box[int], "at content: expected int, found str"),
    ({"content": 1, "more": {"k": [1, None]}}, Box[int], "at more[key 0][1]: expected int, found nothing (null)"),
    ({"content": "hunter2"}, Crate[str], "at content: expected int, found str"),
    ("hunter2", int | None, "expected int, found str"),
    ("hunter2", int | list[int], "expected a value for one member of the union, found str"),
    ({"kind": "hunter2"}, Disk | Net, "expected a value for one member of the union, found dict"),
    ({"kind": "disk", "size": "hunter2"}, Disk | Net, "at size: expected int, found str"),
    ({"Segment": {"base": "hunter2"}}, Segment | Wrapper, "at Segment.base: expected int, found str"),
    ("hunter2", Chain, "expected a map for Chain, found str"),
    ({"next": {"next": 5}}, Chain, "at next.next: expected a map for Chain, found int"),
]


@pytest.mark.parametrize(("value", "type", "message"), MISMATCHES, ids=lambda part: None)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_of_the_type_is_named_by_its_place_and_never_shown(
    tmp_path: Path, value: Any, type: Any, message: str, format: Any
) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1", format=format).write_fragment("cpu", value)
    reader = vmsnap.SnapshotReader(tmp_path / "vm1")
    with pytest.raises(vmsnap.CorruptSnapshotError) as caught:
        reader.read_fragment("cpu", type, format=format)
    text = str(caught.value)
    assert f"does not have the requested type: {message}" in text
    assert str(tmp_path / "vm1") in text
    assert "cpu" in text
    assert "hunter2" not in text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("value", "type", "message"),
    [
        ({b"ab": 1}, dict[str, int], "at [key 0]: expected str, found bytes"),
        ({(1, 2): 1}, dict[list[int], int], "a map key or set member is a list, which is not hashable"),
        (b"hunter2", str, "expected str, found bytes"),
        (10**400, float, "expected float, found int"),
        (NOON, dt.date, "expected date, found datetime"),
        (np.array([1], "u2"), bytes, "expected bytes, found ndarray"),
        (np.zeros((2, 2), "u1"), bytes, "expected bytes, found ndarray"),
        ([np.zeros(2)], list[None], "at [0]: expected null, found ndarray"),
        (np.zeros(2), Segment, "expected a map for Segment, found ndarray"),
        (np.zeros(2), Colour, "expected a value or name of Colour, found ndarray"),
        (np.zeros(2), Literal["a"], "expected one of 'a', found ndarray"),
        (np.array(5), list[int], "expected a list, found ndarray"),
    ],
)
def test_what_cbor_alone_has_is_no_other_type_either(value: Any, type: Any, message: str) -> None:
    with pytest.raises(vmsnap.CorruptSnapshotError) as caught:
        built(value, type)
    assert str(caught.value) == f"the value does not have the requested type: {message}"


@pytest.mark.parametrize(
    "data",
    [
        b'{"hunter2":1,"hunter2":2}',
        b'{"\\u0068unter2":1,"hunter2":2}',
        bytes.fromhex("a2 67") + b"hunter2" + bytes.fromhex("01 67") + b"hunter2" + b"\x02",
        bytes.fromhex("c0 67") + b"hunter2",
        bytes.fromhex("d903ec 67") + b"hunter2",
        bytes.fromhex("d90102 82 67") + b"hunter2" + b"\x67hunter2",
    ],
)
def test_nothing_of_a_malformed_value_is_shown(data: bytes) -> None:
    with pytest.raises(vmsnap.CorruptSnapshotError, match=r"(twice|isoformat string), (at|before) byte \d+$") as caught:
        decode(data)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


# Types nobody can build ----------------------------------------------------------------------------------------------


class Abstract(abc.ABC):
    @abc.abstractmethod
    def method(self) -> None: ...


class Shape(typing.Protocol):
    def area(self) -> float: ...


@dataclass
class HasCallback:
    callback: typing.Callable[[int], int]


@dataclass
class BadlyNamed:
    a: int = field(metadata={"name": 5})


UNBUILDABLE = [
    5,
    "NotThere",
    ...,
    [int],
    list["NotThere"],  # noqa: F821 (nobody knows it)
    Optional["NotThere"],  # noqa: F821
    typing.Callable[[int], int],
    typing.Optional,
    typing.Union,
    typing.NoReturn,
    typing.ClassVar[int],
    typing.Self,
    typing.Generic,
    typing.Protocol,
    typing.Iterator[int],
    type[int],
    collections.defaultdict[str, int],
    collections.Counter[str],
    Abstract,
    Shape,
    HasCallback,
    BadlyNamed,
    later_annotations.Unresolved,
]


@pytest.mark.parametrize("type", UNBUILDABLE, ids=repr)
def test_a_type_that_nobody_can_build_is_refused_before_anything_is_read(tmp_path: Path, type: Any) -> None:
    reader = vmsnap.SnapshotReader(vmsnap.SnapshotWriter(tmp_path / "vm1").path)
    deeper = dataclasses.make_dataclass("Deeper", [("part", dict[str, list[type] if type is not ... else list[5]])])
    for kind in (type, deeper, list[deeper | None], dict[str, tuple[int, deeper]]):
        # There is no such fragment: nobody looked.
        with pytest.raises(vmsnap.InvalidArgumentError, match=r"cannot build|cannot resolve|must be a str"):
            reader.read_fragment("nothing", kind)
        with pytest.raises(vmsnap.InvalidArgumentError):
            decode(b"\xf6", kind)


# Time ----------------------------------------------------------------------------------------------------------------


def test_unions_in_unions_are_tried_once_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value is built once, however deep; a union that tried its members to the end would double at each level."""
    made: collections.Counter[type] = collections.Counter()
    for cls in (Node, Leaf):
        original = cls.__init__

        def counted(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> None:
            made[type(self)] += 1
            _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", counted)
    value: Any = {"value": 1}
    for _ in range(60):
        value = {"kids": [value, 5]}
    result = built(value, Node | Leaf | int)
    assert made == {Node: 60, Leaf: 1}
    assert result.kids[1] == 5
    made.clear()
    failing: Any = {"value": "wrong"}
    for _ in range(60):
        failing = {"kids": [failing]}
    with pytest.raises(vmsnap.CorruptSnapshotError, match="and deeper: expected int, found str"):
        built(failing, Node | Leaf | int)
    assert not made
