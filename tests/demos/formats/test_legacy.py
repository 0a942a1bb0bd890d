"""Pickles of arrays are read; nothing in a pickle runs, and nothing is made that it does not hold.

The hostile ones are written opcode by opcode where Python's pickler would not.
"""

import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iqmpc.demos import DemonstrationError, Demonstrations, Facts
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import LEGACY, read
from iqmpc.demos.types import Defect


@pytest.fixture
def load(tmp_path):
    """The set that a pickle (or its bytes) holds."""

    def loader(content, protocol=pickle.HIGHEST_PROTOCOL):
        return Demonstrations.from_draft(draft(tmp_path, content, protocol))

    return loader


@pytest.fixture
def refusal(tmp_path):
    """What is said to be found in a pickle that is refused."""

    def found(content, protocol=pickle.HIGHEST_PROTOCOL):
        defect = draft(tmp_path, content, protocol)
        assert isinstance(defect, Defect), defect
        assert defect.expected == "a pickle of NumPy arrays and plain containers alone"
        return defect.found

    return found


def draft(folder, content, protocol=pickle.HIGHEST_PROTOCOL):
    path = folder / "expert.pkl"
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    path.write_bytes(data)
    return read(path, LEGACY, Facts(task="t"))


def columns(demos, next_states=True):
    """IQ-Learn's dictionary."""
    episodes = demos.episodes
    held = {
        "states": [e.observations[:-1].astype("f8") for e in episodes],
        "next_states": [e.observations[1:] for e in episodes],
        "actions": [e.actions for e in episodes],
        "rewards": [e.rewards for e in episodes],
        "dones": [np.arange(len(e.actions)) == len(e.actions) - 1 for e in episodes],
        "lengths": [len(e.actions) for e in episodes],
    }
    if not next_states:
        del held["next_states"]
    return held


def assert_held(found, demos):
    assert len(found) == len(demos)
    for one, other in zip(demos.episodes, found.episodes, strict=True):
        np.testing.assert_array_equal(other.observations, one.observations)
        np.testing.assert_array_equal(other.actions, one.actions)
        np.testing.assert_array_equal(other.rewards, one.rewards)
        assert other.terminated is False


@pytest.mark.parametrize("protocol", range(6))
def test_a_dictionary_of_lists(load, demos, protocol):
    assert_held(load(columns(demos), protocol), demos)


@pytest.mark.parametrize("protocol", range(6))
def test_the_module_names_of_both_numpys(load, demos, protocol):
    """NumPy 2 pickles numpy._core, NumPy 1 numpy.core: the same otherwise."""
    data = pickle.dumps(columns(demos), protocol)
    here = b"numpy._core." if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else b"numpy.core."
    other = b"numpy.core." if here == b"numpy._core." else b"numpy._core."
    assert here in data
    for module in (b"multiarray", b"numeric"):
        old, new = here + module, other + module
        if protocol >= 4:  # a short text and its length
            old, new = b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new
        data = data.replace(old, new)
    if protocol >= 4:  # without the frames, whose lengths have changed
        data = unframed(data)
    assert here not in data and other in data
    assert_held(load(data), demos)


def unframed(data):
    """The pickle without its frames' headers, which are optional."""
    out, at = b"", 0
    while (found := data.find(b"\x95", at)) >= 0:
        length = data[found + 1 : found + 9]
        if length[3:] == bytes(5):  # a frame's length, and no other byte 0x95
            out, at = out + data[at:found], found + 9
        else:
            out, at = out + data[at : found + 1], found + 1
    return out + data[at:]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_lists_of_trajectories(load, demos, protocol):
    held = columns(demos)
    dicts = [
        OrderedDict(
            observations=held["states"][i],
            next_observations=held["next_states"][i],
            actions=held["actions"][i],
            rewards=held["rewards"][i],
            terminals=np.zeros(len(held["actions"][i]), bool),
        )
        for i in range(3)
    ]
    assert_held(load(dicts, protocol), demos)
    tuples = [(e.observations, e.actions, e.rewards) for e in demos.episodes]
    assert_held(load(tuples, protocol), demos)
    plain = [(e.observations.tolist(), e.actions.tolist(), list(e.rewards)) for e in demos.episodes]
    assert_held(load(plain, protocol), demos)


def test_one_array_over_all_trajectories(load, make_episode, demos):
    """Padded to the longest, with lengths; or end to end, with lengths; or all of one length."""
    held = columns(demos)
    padded = {
        key: np.stack([np.concatenate([p, np.zeros((6 - len(p), *p.shape[1:]))]) for p in parts])
        for key, parts in held.items()
        if key not in ("lengths", "dones")
    }
    assert_held(load({**padded, "lengths": held["lengths"]}), demos)
    joined = {k: np.concatenate(v) for k, v in held.items() if k != "lengths"}
    assert_held(load({**joined, "lengths": np.array(held["lengths"])}), demos)
    same = Demonstrations("t", tuple(make_episode(4, seed=i) for i in range(2)))
    stacked = {k: np.stack(v) for k, v in columns(same).items() if k != "lengths"}
    assert_held(load(stacked), same)


def test_what_is_missing_is_dropped_and_said(load, demos):
    found = load(columns(demos, next_states=False))
    assert [len(e.actions) for e in found.episodes] == [3, 4, 5]
    assert found.provenance["source_format"] == LEGACY
    assert found.provenance["dropped_steps"].startswith("3, ")


def test_terminals_tell_and_dones_do_not(load, demos):
    held = columns(demos)
    held["terminals"] = [np.array([0] * (n - 1) + [i == 1]) for i, n in enumerate((4, 5, 6))]
    assert [e.terminated for e in load(held).episodes] == [False, True, False]


def test_other_dtypes_and_orders(load, demos):
    held = columns(demos)
    held["states"] = [np.asfortranarray(x.astype(">f8")) for x in held["states"]]
    held["actions"] = [np.asfortranarray(x) for x in held["actions"]]
    held["rewards"] = [list(x.astype("f8")) for x in held["rewards"]]  # NumPy's scalars
    default = defaultdict(list, held)
    for protocol in range(6):
        assert_held(load(dict(default), protocol), demos)
        assert_held(load(default, protocol), demos)


def test_python_2_wrote_text_for_bytes(load):
    """Protocol 2 with the arrays' bytes as text, as Python 2 did; by hand."""

    def array(values):
        raw = np.array(values, "<f8").tobytes()
        shape = b"(" + b"".join(b"K" + bytes([n]) for n in np.shape(values)) + b"t"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01" + shape + b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R"
            b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
        )

    states, actions = [[1.0, 2.0], [3.0, 4.0], [5.0, 250.5]], [[0.5], [-0.5]]
    data = b"\x80\x02}(U\x06states](" + array(states) + b"eU\x07actions](" + array(actions) + b"eu."
    found = load(data).episodes[0]
    np.testing.assert_array_equal(found.observations, np.float32(states))
    np.testing.assert_array_equal(found.actions, np.float32(actions))


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


TOUCHED = "touched-by-a-pickle"


def touch(folder):
    return f"touch {folder / TOUCHED}"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda f: Call(os.system, touch(f)), "posix.system"),
        (lambda f: {"states": [[Call(os.system, touch(f))]], "actions": []}, "posix.system"),
        (lambda f: Call(eval, f"open({str(f / TOUCHED)!r}, 'w')"), "eval"),
        (lambda f: Call(subprocess.call, ["touch", str(f / TOUCHED)]), ".call"),
        (lambda f: Call(getattr, os, "system"), "getattr"),
        (lambda f: [Call(np.load, str(f))], "numpy.load"),
        (lambda f: [Call(np.fromfile, str(f))], "fromfile"),
        (lambda f: [np.ma.array([1.0])], "numpy.ma"),
        (lambda f: [{1, 2}], "set"),
        (lambda f: [1j], "complex"),
    ],
)
def test_every_other_name_is_refused_by_it(tmp_path, refusal, wrap, name, protocol):
    content = wrap(tmp_path)
    if name == "getattr":  # modules cannot be pickled: the name of one can
        content = b"cbuiltins\ngetattr\n(cos\nsystem\nVname\ntR."
    found = refusal(content, protocol)
    assert name in found
    assert not (tmp_path / TOUCHED).exists()


def test_objects_in_arrays_run_nothing(tmp_path, refusal):
    bomb = Call(os.system, touch(tmp_path))
    for protocol in range(6):
        array = np.array([bomb, None], object)
        assert refusal({"states": [array], "actions": [array]}, protocol) in (
            "an array of Python objects",
            "'posix.system'",
        )
        assert refusal([np.array([None])], protocol) == "an array of Python objects"
        assert not (tmp_path / TOUCHED).exists()
    for dtype in ([("a", "f8")], "M8[s]", "S3", "U3", "V8", "c16"):
        assert "dtype" in refusal([np.zeros(2, dtype)])


DTYPE = b"cnumpy\ndtype\n(Vf8\nI0\nI1\ntR"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
SYSTEM = b"cos\nsystem\n"

# What a pickler never writes, and what is said of it.
HOSTILE = {
    "inst": (b"(S'echo'\nios\nsystem\n.", "the opcode INST"),
    "obj": (b"(" + SYSTEM + b"S'echo'\no.", "the opcode OBJ"),
    "newobj": (b"\x80\x02" + SYSTEM + b")\x81.", "the opcode NEWOBJ"),
    "newobj_ex": (b"\x80\x04" + SYSTEM + b")}\x92.", "the opcode NEWOBJ_EX"),
    "persistent": (b"Pname\n.", "the opcode PERSID"),
    "extension": (b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "buffer": (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
    "stacked name": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
    "name from the memo": (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.",
        "'os.system'",
    ),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.newbyte\x93.", "'numpy.dtype.newbyte'"),
    "a module of the allowed": (
        b"cnumpy.core.multiarray\nfrombuffer\n.",
        "'numpy.core.multiarray.frombuffer'",
    ),
    "huge memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "a memo of 2147483647 entries in 3 steps"),
    "huge memo in text": (b"Np99999999999\n.", "a memo of 99999999999 entries"),
    "negative memo": (b"Np-5\n.", "a memo of -5 entries"),
    "huge bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", "a truncated or damaged"),
    "huge bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.", "a truncated or damag"),
    "huge text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.", "a truncated or damaged"),
    "huge number": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.", "a truncated or dam"),
    "huge frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "a damaged pickle ("),
    "huge array": (
        EMPTY + b"(I1\n(L99999999999999L\nt" + DTYPE + b"I00\nVab\ntb.",
        "an array of 799999999999992 bytes with 2",
    ),
    "shape that overflows": (
        EMPTY + b"(I1\n(L4294967296L\nL4294967296L\nt" + DTYPE + b"I00\nV\ntb.",
        "an array of 147573952589676412928 bytes with 0",
    ),
    "negative shape": (
        EMPTY + b"(I1\n(I-1\nt" + DTYPE + b"I00\nVabcdefgh\ntb.",
        "an array's shape that is none",
    ),
    "dimensions without end": (
        EMPTY + b"(I1\n(" + b"I1\n" * 40 + b"t" + DTYPE + b"I00\nVabcdefgh\ntb.",
        "an array's shape that is none",
    ),
    "list for bytes": (EMPTY + b"(I1\n(I1\nt" + DTYPE + b"I00\n]tb.", "an array of list"),
    "state of a function": (b"cnumpy\ndtype\n(dVname\nVx\nsb.", "a change to a function"),
    "slots of a function": (b"cnumpy\ndtype\n(N}Vname\nVx\nstb.", "a change to a function"),
    "state of a class": (EMPTY + b"}Vvalue\nVx\nsb.", "an array's state that is none"),
    "subarray": (DTYPE + b"p0\n(I3\nV|\n(g0\n(I2\nttNNI-1\nI-1\nI0\ntb.", "a structured dtype"),
    "fields": (DTYPE + b"(I3\nV|\nN(Va\nt}I8\nI1\nI1\ntb.", "a structured dtype"),
    "flags of an object": (b"cnumpy\ndtype\n(VO8\nI0\nI1\ntR.", "an array of Python objects"),
    "dtype by a type": (b"cnumpy\ndtype\n(cnumpy\nndarray\nI0\nI1\ntR.", "an array of dtype _Call"),
    "dtype with a long name": (
        b"cnumpy\ndtype\n(V" + b"x" * 999 + b"\nI0\nI1\ntR.",
        "an array of dtype 'xxxxxxxxxxxxxxxxxxxx'",
    ),
    "ndarray called": (b"cnumpy\nndarray\n(I5\ntR.", "a call of numpy.ndarray"),
    "encode to run a codec": (b"c_codecs\nencode\n(Vabc\nVzip\ntR.", "bytes in another encoding"),
    "list of everything": (b"cbuiltins\nlist\n(Vabc\ntR.", "a damaged pickle ("),
    "nothing": (b"", "a truncated or damaged pickle ("),
    "no end": (b"\x80\x04]", "a truncated or damaged pickle ("),
    "no pickle": (b"states,actions", "a truncated or damaged pickle ("),
    "a number": (b"I5\n.", "a int where there should be a dict of lists"),
    "an empty list": (b"].", "a list where there should be"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_pickler_never_writes(refusal, case):
    data, message = HOSTILE[case]
    assert refusal(data).startswith(message)


def test_a_list_that_holds_itself(refusal):
    loop = []
    loop.append(loop)
    assert (
        refusal(loop) == "a list of list where there should be a dict of lists (states, "
        "actions, rewards, lengths, …), a list of such dicts, or a list of (observations, "
        "actions, rewards) tuples"
    )
    loop = [[], []]
    loop[0] += [loop, loop]
    loop[1] += [loop, loop]
    assert refusal(loop) == "a list of other things than numbers"


def test_nesting_without_end(refusal):
    depth = 200_000
    data = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    assert "where there should be" in refusal(data)


def test_tuples_of_tuples_as_keys_take_no_time_without_end(refusal):
    """Hashing sixty levels of (t, t) would take 2^60 steps."""
    key = ()
    for _ in range(60):
        key = (key, key)
    for protocol in range(6):
        assert refusal([key], protocol) == ("references that repeat its data many times over")
    level = b")"
    for i in range(60):  # remembered after another step, and called up twice
        level += b"]0q" + bytes([i]) + b"h" + bytes([i]) + b"\x86"
    assert refusal(b"\x80\x02}" + level + b"Ns.") == (
        "references that repeat its data many times over"
    )
    assert refusal(b"\x80\x02}(N2\x86Ns.") == "the opcode DUP"


def test_a_trajectory_may_be_referred_to_again(load, demos):
    first = demos.episodes[0]
    item = (first.observations, first.actions, first.rewards)
    for protocol in range(6):
        assert len(load([item] * 8, protocol)) == 8


def measured(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_reference_repeated_does_not_become_copies(refusal):
    """A thousand trajectories that are one array of a megabyte each are not a gigabyte."""
    states, actions = np.zeros((2**15 + 1, 4)), np.zeros((2**15, 1))
    data = pickle.dumps([(states, actions)] * 1000)
    assert len(data) < 2**21
    peak = measured(lambda: refusal(data))
    assert refusal(data) == "references that repeat its data many times over"
    assert peak < 40 * len(data)


def test_text_repeated_through_a_call_does_not_become_copies(refusal):
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20
    call = b"c_codecs\nencode\n(h\x00tR0"
    data = b"\x80\x02" + text + b"q\x00" + call * 1000 + b"."
    peak = measured(lambda: refusal(data))
    assert refusal(data) == "references that repeat its data many times over"
    assert peak < 20 * len(data)


def test_lists_of_references_stay_within_the_files_size(refusal):
    """Lists of lists of two, sixty deep, are 2^60 in a few bytes: they are not walked."""
    level = []
    for _ in range(60):
        level = [level, level]
    assert refusal(pickle.dumps(level)) == "a list of other things than numbers"


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
@example(b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.")
def test_any_bytes_are_a_set_or_a_defect(tmp_path_factory, data):
    found = draft(tmp_path_factory.mktemp("pickle"), data)
    assert list(find_defects(found))


def test_wrong_bytes_never_end_in_a_traceback(tmp_path, demos):
    data = pickle.dumps(columns(demos), 4)
    refused = 0
    for offset in np.random.default_rng(0).integers(len(data), size=300):
        spoilt = bytearray(data)
        spoilt[offset] ^= 0xFF
        refused += bool(list(find_defects(draft(tmp_path, bytes(spoilt)))))
    assert refused > 30


def test_values_are_checked_as_everywhere(tmp_path, demos):
    held = columns(demos)
    held["actions"][1] = held["actions"][1] * 0 + 2
    held["states"][0][1, 1] = np.nan
    found = [str(d).split(": ")[1] for d in find_defects(draft(tmp_path, held))]
    assert found == [
        "found nan at [1, 1], expected finite values",
        "found 2.0 at [0, 0] and 9 more, expected values in [-1, 1]; --clip-actions where "
        "the simulator clipped them, --action-low and --action-high rescale from another range",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"states": [[1.0]]}, "a dict with observations where there should be a dict of lists"),
        ({"x": 1}, "a dict with no known key where there should be"),
        ({"states": [[[1.0]]], "actions": [[[1.0]], [[1.0]]]}, "1 observations for 2 trajectories"),
        ({"states": "abc", "actions": [[[1.0]]]}, "observations of str"),
        ({"states": [[[1.0], [1.0, 2.0]]], "actions": [[[1.0]]]}, "rows of different lengths"),
        ({"states": [[["a"]]], "actions": [[[1.0]]]}, "a list of other things than numbers"),
        ({"states": [[[10**400]]], "actions": [[[1.0]]]}, "a number beyond all floats"),
        ({"states": [3], "actions": [[[1.0]]]}, "a int where there should be a list or an array"),
        ({"states": [], "actions": [], "lengths": [float("nan")]}, "lengths that are none"),
        (
            {"states": [[[1.0]]] * 3, "actions": [[[1.0]]] * 3, "lengths": [2, 2]},
            "3 observations where lengths add up to 4",
        ),
        ([{"actions": [[1.0]]}], "a trajectory with actions alone"),
        ([3], "a list of int where there should be"),
        ([np.zeros(())], "a list of array where there should be"),
    ],
)
def test_containers_that_hold_no_demonstrations(refusal, content, message):
    assert refusal(content).startswith(message)


def test_a_pickle_that_is_not_there(tmp_path):
    with pytest.raises(DemonstrationError, match="absent.pkl: cannot be read: No such file"):
        read(tmp_path / "absent.pkl", LEGACY)


def test_nothing_is_imported_by_a_pickle(tmp_path):
    """Not even the module of a name that is refused."""
    (tmp_path / "sideeffect.py").write_text(f"open({str(tmp_path / TOUCHED)!r}, 'w')\nrun = print")
    (tmp_path / "a.pkl").write_bytes(b"csideeffect\nrun\n(tR.")
    code = (
        "import sys; from iqmpc.demos.formats import LEGACY, read\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"print(read({str(tmp_path / 'a.pkl')!r}, LEGACY).found)\n"
        "assert 'sideeffect' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "'sideeffect.run'\n" and not (tmp_path / TOUCHED).exists()


def test_the_stand_ins_are_the_same_after_an_attack(load, demos):
    """A pickle that tried to change them has changed nothing for the next one."""
    from iqmpc.demos.formats import legacy

    before = {name: vars(getattr(legacy, name)).copy() for name in ("Array", "_Dtype", "_Call")}
    for data, _ in HOSTILE.values():
        with pytest.raises(legacy._Refused):
            found = legacy.load(data)
            raise legacy._Refused(str(type(found)))
    assert before == {name: dict(vars(getattr(legacy, name))) for name in before}
    assert_held(load(columns(demos)), demos)
