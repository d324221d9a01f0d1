"""The cache: whatever lies in it, wherever it lies and whoever else uses it, the right network comes out."""

import os
import resource
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data import mirror  # noqa: F401  (fixture)
from torch import nn
from torch.utils.data import TensorDataset

from lora_helpers import cache, cache_folder, clear_cache, load_mnist, pretrained_base, train, training
from lora_helpers.data import FILES, Mnist


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LORA_MNIST_ROOT", raising=False)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def few():
    """Sixty images: trained in a blink, by the same code."""
    images, labels = load_mnist("sample").train.tensors
    part = TensorDataset(images[::50].clone(), labels[::50].clone())
    return Mnist(part, part, "sample")


def base(mnist, **settings):
    return pretrained_base(mnist, progress=False, **settings).state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def replace_by_a_folder(file):
    file.unlink()
    file.mkdir()
    (file / "somebody's.txt").write_text("kept")


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "last byte missing": lambda file: os.truncate(file, file.stat().st_size - 1),
    "a header of 2**63 bytes": lambda file: file.write_bytes(b"\xff" * 7 + b"\x7f{}"),
    "a text": lambda file: file.write_text("not a safetensors file"),
    "a pickle": lambda file: torch.save({"linear1.weight": torch.zeros(1)}, file),
    "one bit": flip_a_bit,
    "other shapes": lambda file: save_file({"linear1.weight": torch.zeros(3, 3)}, file),
    "no tensors": lambda file: save_file({}, file),
    "not a number": lambda file: rewrite(file, lambda tensors: tensors["linear2.bias"].fill_(float("nan"))),
    "an infinite value": lambda file: rewrite(file, lambda tensors: tensors["linear3.bias"].fill_(float("inf"))),
    "a tensor too few": lambda file: rewrite(file, lambda tensors: tensors.pop("linear3.bias")),
    "a tensor too many": lambda file: rewrite(file, lambda tensors: tensors.update(more=torch.zeros(1))),
    "double precision": lambda file: rewrite(file, lambda tensors: tensors.update(tensors | {"linear3.bias": torch.zeros(10).double()})),
    "another network of the same shapes": lambda file: rewrite(file, lambda tensors: tensors["linear1.weight"].mul_(2)),
    "a folder": replace_by_a_folder,
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_set_aside_and_made_anew(folder, few, damage):
    first = base(few)
    (file,) = folder.iterdir()
    damage(file)
    with pytest.warns(UserWarning, match=r"is damaged .*It is now base-.*\.damaged, and is made anew"):
        assert same(base(few), first)
    assert sorted(path.suffix for path in folder.iterdir()) == [".damaged", ".safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(base(few), first)


def test_a_file_that_another_kernel_has_made_anew_is_left_in_place(folder, few, monkeypatch):
    first = base(few)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_text("damage")
    read = cache.parse_safetensors

    def made_anew_meanwhile(content):
        beside = folder / "new"
        beside.write_bytes(whole)
        beside.replace(file)
        return read(content)

    monkeypatch.setattr(cache, "parse_safetensors", made_anew_meanwhile)
    assert same(base(few), first)
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_each_damaged_file_is_kept(folder, few):
    base(few)
    next(folder.iterdir()).write_text("damage")
    for _ in range(2):
        with pytest.warns(UserWarning, match="damaged"):
            base(few)
        next(folder.glob("*.safetensors")).write_text("damage")
    with pytest.warns(UserWarning, match="damaged2"):
        base(few)
    assert len(list(folder.glob("*.damaged*"))) == 3
    clear_cache()
    assert list(folder.iterdir()) == []


def forbidden(*args, **settings):
    raise PermissionError(13, "Permission denied")  # as for a pupil; the tests may run as root, for whom nothing is forbidden


def test_an_unreadable_file_is_set_aside(folder, few, monkeypatch):
    first = base(few)
    monkeypatch.setattr("pathlib.Path.read_bytes", forbidden)
    with pytest.warns(UserWarning, match="is damaged .*Permission denied.*made anew"):
        assert same(base(few), first)


AS_NOBODY = """
import os, sys
from pathlib import Path
import torch
from lora_helpers.adapters import _read
from lora_helpers.cache import load_tensors
os.setuid(65534)
if sys.argv[1] == "cache":
    print(load_tensors("base", like={"x": torch.zeros(3)}))
else:
    _read(Path(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become somebody else")
def test_to_somebody_who_may_not_read_a_file_it_is_not_missing(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lets nobody else in
        for path, mode in ((Path(folder), 0o755), (Path(folder) / "base.safetensors", 0), (Path(folder) / "adapter_config.json", 0)):
            path.touch()
            path.chmod(mode)
        monkeypatch.setenv("LORA_CACHE", folder)
        ran = [subprocess.run([sys.executable, "-c", AS_NOBODY, what], capture_output=True, text=True) for what in ("cache", folder)]
    assert ran[0].stdout == "None\n" and "is damaged ([Errno 13] Permission denied" in ran[0].stderr and "cannot be set aside either" in ran[0].stderr
    assert f"PermissionError: {folder}/adapter_config.json cannot be read: Permission denied. Save the adapter again" in ran[1].stderr


def test_a_file_that_is_shortened_while_it_is_read_kills_no_kernel(folder, few, monkeypatch):
    first = base(few)
    (file,) = folder.iterdir()
    digest = cache._digest

    def shorten(*args):
        os.truncate(file, 0)  # were the file mapped into memory, the next look at a tensor would be a SIGBUS
        return digest(*args)

    monkeypatch.setattr(cache, "_digest", shorten)
    monkeypatch.setattr(training, "train", None)
    assert same(base(few), first)


FOREIGN = {
    "other keys": (lambda tensors: {"x": torch.zeros(3)}, "another network"),
    "other shapes": (lambda tensors: tensors | {"linear3.bias": torch.zeros(11)}, "another network"),
    "double precision": (lambda tensors: tensors | {"linear3.bias": torch.zeros(10).double()}, "another network"),
    "not a number": (lambda tensors: tensors | {"linear3.bias": torch.full((10,), float("nan"))}, "NaN or infinite"),
}


@pytest.mark.parametrize("change, reason", FOREIGN.values(), ids=FOREIGN)
def test_a_whole_file_of_something_else_is_set_aside(folder, few, change, reason):
    first = base(few)
    (file,) = folder.iterdir()
    cache.save_tensors(file.stem, change(first))
    with pytest.warns(UserWarning, match=f"{reason}.*made anew"):
        assert same(base(few), first)


def test_a_base_that_diverged_is_not_kept(folder, few, monkeypatch):
    monkeypatch.setattr(training, "train", lambda net, *args, **settings: net.linear3.bias.data.fill_(float("nan")))
    assert not base(few)["linear3.bias"].isfinite().any() and not folder.exists()


def test_whatever_the_default_dtype_the_base_is_the_same(few):
    first = base(few)
    clear_cache()
    torch.set_default_dtype(torch.float64)
    try:
        assert same(base(few), first) and same(base(few), first)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_base_is_trained_on_float32_images_without_gradients(few, folder):
    images, labels = few.train.tensors
    coarse = images.to(torch.bfloat16)
    bases = [base(Mnist(TensorDataset(x, labels), few.test, "sample")) for x in (coarse, coarse.float(), images.clone().requires_grad_())]
    assert same(bases[0], bases[1]) and same(bases[2], base(few)) and len(list(folder.iterdir())) == 2


def test_a_folder_that_may_be_read_only(folder, few, monkeypatch):
    first = base(few)
    for target in ("tempfile.TemporaryDirectory", "pathlib.Path.replace", "pathlib.Path.unlink"):
        monkeypatch.setattr(target, forbidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(base(few), first)
    (file,) = folder.iterdir()
    flip_a_bit(file)
    with pytest.warns(UserWarning) as words:
        assert same(base(few), first)
    assert ["cannot be set aside either" in str(w.message) for w in words] == [True, False]
    assert "Not cached" in str(words[1].message)
    with pytest.warns(UserWarning, match="Not deleted"):
        clear_cache()
    assert list(folder.iterdir()) == [file]


def test_what_one_has_cached_the_others_may_read(folder, few):
    before = os.umask(0o022)
    try:
        base(few)
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_file_of_another_seed_under_this_ones_name_is_not_taken(folder, few):
    first = base(few)
    (file,) = folder.iterdir()
    base(few, seed=1)
    next(path for path in folder.iterdir() if path != file).replace(file)
    with pytest.warns(UserWarning, match="not what was saved"):
        assert same(base(few), first)


def test_a_whole_file_is_read_and_nothing_is_trained(folder, few, monkeypatch):
    stream = torch.get_rng_state()
    first = base(few)
    monkeypatch.setattr(training, "train", None)
    assert same(base(few), first) and torch.equal(torch.get_rng_state(), stream)


class OwnNet(nn.Module):
    """As a learner writes it."""

    def __init__(self, between=nn.ReLU, hidden_size_1=1000):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(28 * 28, hidden_size_1), nn.Linear(hidden_size_1, 2000)
        self.linear3, self.between = nn.Linear(2000, 10), between()

    def forward(self, images):
        x = self.between(self.linear1(images.flatten(start_dim=1)))
        return self.linear3(self.between(self.linear2(x)))


def as_in_notebook_1(few, make=OwnNet, seed=0, change=lambda net: net, **settings):
    torch.manual_seed(seed)
    net = change(make())
    train(net, few.train, **{"epochs": few.pretraining_epochs, "seed": 0, "progress": False} | settings)
    return net.state_dict()


def test_what_notebook_1_trains_is_the_base_of_the_others(folder, few, monkeypatch):
    own = as_in_notebook_1(few)
    assert len(list(folder.iterdir())) == 1 and training.base_is_cached(few)
    monkeypatch.setattr(training, "train", None)
    assert same(base(few), own)


def freeze_a_layer(net):
    net.linear1.requires_grad_(False)
    return net


NOT_QUITE = {
    "another start": {"seed": 1},
    "a frozen layer": {"change": freeze_a_layer},
    "float64": {"change": lambda net: net.double()},
    "another activation": {"make": lambda: OwnNet(nn.GELU)},
    "dropout": {"make": lambda: OwnNet(nn.Dropout)},
    "a smaller layer": {"make": lambda: OwnNet(hidden_size_1=900)},
    "other names": {"make": lambda: nn.Sequential(nn.Flatten(), OwnNet())},
    "another rate": {"lr": 2e-3},
    "larger batches": {"batch_size": 20},
    "counted batches": {"max_batches": 18},
    "another optimiser": {"optimizer_class": torch.optim.SGD},
}


@pytest.mark.parametrize("other", NOT_QUITE.values(), ids=NOT_QUITE)
def test_what_is_not_quite_the_base_is_not_kept(folder, few, other):
    as_in_notebook_1(few, **other)
    assert not folder.exists() and not training.base_is_cached(few)


def test_a_base_of_other_images_or_passes_is_not_taken_for_this_one(folder, few):
    images, labels = few.train.tensors
    as_in_notebook_1(few, epochs=2)
    as_in_notebook_1(Mnist(TensorDataset(images.flip(0), labels.flip(0)), few.test, "sample"))
    assert len(list(folder.iterdir())) == 2 and not training.base_is_cached(few)


def test_an_interrupted_lesson_keeps_nothing(folder, few, monkeypatch):
    def stop(batch):
        if batch == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_in_notebook_1(few, after_batch=stop)
    assert not folder.exists()


def test_all_that_determines_a_base_is_in_its_key(few, monkeypatch):
    def key(mnist=few, epochs=3, seed=0):
        return training._fingerprint(mnist.train, epochs, seed)

    images, labels = few.train.tensors
    pixel, label = images.clone(), labels.clone()
    pixel[0, 0, 0, 0] += 1e-6
    label[0] = 9
    keys = [key(), key(epochs=1), key(seed=1)]
    keys += [key(Mnist(TensorDataset(*tensors), few.test, "sample")) for tensors in ((pixel, labels), (images, label))]
    for module, name in ((training, "__version__"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "9.9")
            keys.append(key())
    assert len(set(keys)) == len(keys) == 7 and key() == keys[0]
    assert training.__version__ == version("lora-helpers")


def check_nothing_is_cached(few):
    with pytest.warns(UserWarning, match="Not cached"):
        first = base(few)
    with pytest.warns(UserWarning, match="Not cached"):
        assert same(base(few), first)
    clear_cache()


def test_a_folder_that_cannot_be_made(folder, few, monkeypatch):
    folder.write_text("a file in its place")
    check_nothing_is_cached(few)
    monkeypatch.setenv("LORA_CACHE", str(folder / "below a file"))
    check_nothing_is_cached(few)
    monkeypatch.setenv("LORA_CACHE", "/" + 5000 * "absurd")
    check_nothing_is_cached(few)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that lets nobody write")
def test_a_read_only_file_system(few, monkeypatch):
    monkeypatch.setenv("LORA_CACHE", "/proc/lora")
    check_nothing_is_cached(few)


def test_a_full_disk(folder, few):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # the system refuses what goes beyond, as a full disk does
        check_nothing_is_cached(few)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == [], "no half file stays behind"


def test_an_interrupted_write_leaves_nothing_behind(folder, few, monkeypatch):
    first = base(few)
    clear_cache()

    def interrupted(path, content):
        path.open("wb").write(content[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            base(few)
    assert list(folder.iterdir()) == []
    assert same(base(few), first)


KERNEL = """
import random, sys, warnings
from lora_helpers import clear_cache, load_mnist, pretrained_base
from lora_helpers.data import Mnist
from torch.utils.data import TensorDataset
images, labels = load_mnist("sample").train.tensors
part = TensorDataset(images[::50].clone(), labels[::50].clone())
few, random = Mnist(part, part, "sample"), random.Random(sys.argv[1])
for clearing in (False, True):
    print("ready", flush=True)
    sys.stdin.readline()  # so that neither clears while the other still counts a warning as an error
    warnings.simplefilter("default" if clearing else "error")
    for round in range(12):
        seed = round // 2 % 3
        print(seed, sum(p.double().sum().item() for p in pretrained_base(few, seed=seed, progress=False).parameters()))
        if clearing and random.random() < 0.3:
            clear_cache()
"""


def test_two_kernels_at_once(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    kernels = [subprocess.Popen([sys.executable, "-c", KERNEL, name], **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"}) for name in "ab"]
    figures = []
    for _ in range(2):
        for kernel in kernels:
            figures += [line.strip() for line in iter(kernel.stdout.readline, "ready\n") if line or pytest.fail(kernel.communicate()[1])]
        for kernel in kernels:
            kernel.stdin.write("go\n")
            kernel.stdin.flush()
    for kernel in kernels:
        output, errors = kernel.communicate(timeout=120)
        assert kernel.returncode == 0, errors
        figures += output.splitlines()
    assert len(figures) == 48 and len(set(figures)) == 3, "each seed has one network, whoever made it"
    assert not list(folder.glob("*.damaged*"))


def test_clearing_deletes_what_the_collection_made_and_nothing_else(folder, few, tmp_path, capsys):
    base(few)
    own = {path: path.read_bytes() for path in folder.iterdir()}
    raw = folder / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        (raw / name).write_bytes(b"downloaded")
    (raw / "train-images-idx3-ubyte.damaged").write_bytes(b"set aside")
    (folder / "lora-unfinished-abc").mkdir()
    (folder / "lora-unfinished-abc" / "half").write_bytes(b"of a killed kernel")
    (raw / "lora-unfinished-def").mkdir()
    foreign = ["notes.txt", "mine/lora-unfinished-thesis/text", "base.safetensors", "base-my-own.safetensors", "mnist/mine.png", "other/base-sample-0123456789abcdef.safetensors"]
    for name in foreign:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("a user's")
    assert clear_cache() is None and not any(capsys.readouterr())
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(foreign)
    assert not raw.exists()
    base(few)
    assert own.items() <= {path: path.read_bytes() for path in folder.glob("*.safetensors")}.items()


def test_clearing_follows_no_link_out_of_the_folder(folder, tmp_path):
    shared = tmp_path / "shared" / "MNIST" / "raw"
    shared.mkdir(parents=True)
    for name in FILES:
        (shared / name).write_bytes(b"the whole class's")
    folder.mkdir()
    (folder / "mnist").symlink_to(tmp_path / "shared")
    clear_cache()
    assert len(list(shared.iterdir())) == len(FILES)


def test_clearing_where_there_is_nothing(folder):
    clear_cache()
    assert not folder.exists() and cache_folder() == folder


def test_without_the_variable_the_system_says_where(monkeypatch):
    monkeypatch.setenv("LORA_CACHE", "")
    assert cache_folder().name == "lora-notebooks" and cache_folder().is_absolute()


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORA_CACHE", "~/digits")
    assert cache_folder() == tmp_path / "digits"


# Downloads


def test_a_damaged_download_is_set_aside_and_fetched_anew(mirror, folder):  # noqa: F811
    whole = load_mnist("full")
    raw = folder / "mnist" / "MNIST" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(FILES)
    os.truncate(raw / "train-images-idx3-ubyte", 1_000_000)
    flip_a_bit(raw / "t10k-images-idx3-ubyte")
    replace_by_a_folder(raw / "t10k-labels-idx1-ubyte")
    with pytest.warns(UserWarning, match="damaged") as words:
        again = load_mnist("full")
    assert len([word for word in words if "damaged" in str(word.message)]) == 3
    assert all(torch.equal(a, b) for a, b in zip(again.train.tensors + again.test.tensors, whole.train.tensors + whole.test.tensors))
    assert len(list(raw.iterdir())) == len(FILES) + 3
    clear_cache()
    assert [path.name for path in raw.iterdir()] == ["t10k-labels-idx1-ubyte.damaged"], "what is in a folder is nobody's to delete"


def test_a_download_into_a_read_only_folder_is_used_all_the_same(mirror, folder):  # noqa: F811
    folder.write_text("a file in its place")
    with pytest.warns(UserWarning, match="Not cached"):
        assert len(load_mnist("full").test) == 10_000


def test_damaged_files_in_a_folder_of_the_users_own_are_named_and_left_alone(tmp_path, full_mnist_root):
    raw = tmp_path / "own" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        (raw / name).symlink_to((full_mnist_root / "MNIST" / "raw" / name).resolve())
    (raw / "t10k-labels-idx1-ubyte").unlink()
    for content in (b"", b"\0\0\x08\x01\0\0\x27\x10short", b"no idx file at all"):
        (raw / "t10k-labels-idx1-ubyte").write_bytes(content)
        with pytest.raises(RuntimeError, match=r"t10k files in .* are not MNIST's, or are damaged"):
            load_mnist("full", root=tmp_path / "own")
        assert (raw / "t10k-labels-idx1-ubyte").read_bytes() == content


def test_no_pickle_in_a_data_folder_is_opened(tmp_path, mirror, monkeypatch):  # noqa: F811
    processed = tmp_path / "root" / "MNIST" / "processed"
    processed.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(1, 28, 28), torch.zeros(1)), processed / name)
    monkeypatch.setattr(torch, "load", None)
    assert len(load_mnist("full", root=tmp_path / "root").test) == 10_000
