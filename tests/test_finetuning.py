"""Fine-tuning as a computation: settings in, tested adapters out, nothing but the truth remembered."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

import lora_helpers.finetuning as finetuning
from lora_helpers import LoRAParametrization, RichBoyNet, add_lora, evaluate, fine_tune, freeze_base, load_mnist, lora_layers, only_digit, pretrained_base, train
from lora_helpers.data import Mnist
from lora_helpers.finetuning import FineTuner, Settings, singular_values


@pytest.fixture(scope="module")
def mnist():
    return load_mnist("sample")


@pytest.fixture(scope="module")
def base(mnist):
    return pretrained_base(mnist, progress=False)


@pytest.fixture(scope="module")
def tuner(base, mnist):
    return FineTuner(base, mnist)


def test_it_is_what_the_notebook_does_by_hand(base, mnist, tuner):
    torch.manual_seed(0)
    net = freeze_base(add_lora(copy.deepcopy(base), rank=2, alpha=3))
    train(net, only_digit(mnist.train, 9), max_batches=20, seed=0, progress=False)
    by_hand = evaluate(net, mnist.test)
    result = fine_tune(base, mnist, rank=2, alpha=3, batches=20)
    assert (result.on.predictions == by_hand.predictions).float().mean() > 0.995  # the factorised form rounds otherwise
    for name, (adapter,) in lora_layers(net).items():
        exact = torch.linalg.svdvals(adapter.delta.detach())
        assert torch.allclose(result.singular_values[name], exact[: len(result.singular_values[name])], rtol=1e-3, atol=1e-4)
        assert result.norms[name] == pytest.approx(adapter.delta.norm().item(), rel=1e-3)


def test_a_checkpoint_is_the_training_that_ended_there(base, mnist, tuner):
    longer, origin = tuner.run(Settings(rank=3, batches=100))
    assert origin == "just trained"
    scrubbed, origin = tuner.run(Settings(rank=3, batches=20))
    assert origin == "just tested"
    alone = fine_tune(base, mnist, rank=3, batches=20)
    assert torch.equal(alone.on.predictions, scrubbed.on.predictions) and alone.norms == scrubbed.norms
    assert tuner.run(Settings(rank=3, batches=100)) == (longer, "remembered")


def test_everything_that_determines_a_result_is_part_of_its_key(tuner):
    kept = {}
    for change in ({}, {"rank": 2}, {"alpha": 2.0}, {"digit": 4}, {"share": 0.5}, {"seed": 1}, {"batches": 5}):
        kept[str(change)], _ = tuner.run(Settings(**{"batches": 10} | change), stops=())
    assert len({tuple(r.on.predictions.tolist()) + tuple(r.norms.values()) for r in kept.values()}) == len(kept)


def test_repaired_and_broken_are_just_that(mnist, tuner):
    result, _ = tuner.run(Settings())
    labels = mnist.test.tensors[1]
    assert (result.off.predictions[result.repaired] != labels[result.repaired]).all()
    assert (result.on.predictions[result.repaired] == labels[result.repaired]).all()
    assert (result.off.predictions[result.broken] == labels[result.broken]).all()
    assert (result.on.predictions[result.broken] != labels[result.broken]).all()
    assert sum(result.on.wrong_counts) - sum(result.off.wrong_counts) == len(result.broken) - len(result.repaired)


@pytest.mark.parametrize("digits", [(3, 4), (0, 9), (9,)], ids=str)
@pytest.mark.parametrize("each", [1, 15])
def test_a_small_test_set_and_one_that_lacks_digits(base, mnist, digits, each):
    images, labels = mnist.test.tensors
    chosen = torch.cat([(labels == digit).nonzero().flatten()[:each] for digit in digits]).flip(0)
    few = Mnist(mnist.train, TensorDataset(images[chosen], labels[chosen]), "sample")
    tuner, settings = FineTuner(base, few), Settings(rank=2, batches=20)
    result, _ = tuner.run(settings)
    assert all(tuner.proofs(settings).values()) and result.off.confusion.sum() == len(chosen)
    whole = FineTuner(base, mnist).run(settings)[0]
    assert torch.equal(result.on.predictions, whole.on.predictions[chosen]), "in the order of the images"
    before = tuner.run(replace(settings, batches=0))[0]
    assert not len(before.repaired) and not len(before.broken)


def test_trained_ahead_is_as_trained_alone(base, mnist):
    tuner, done = FineTuner(base, mnist), []
    wanted = [Settings(rank=rank, alpha=alpha, batches=10) for rank, alpha in ((1, 1), (4, 1), (4, 2))]
    alone, _ = tuner.run(wanted[1], stops=())
    tuner.train_ahead(wanted, lambda now, of: done.append((now, of)))
    assert done[0] == (1, 10) and done[-1] == (10, 10)
    assert tuner.run(wanted[1]) == (alone, "remembered"), "it was remembered, and is not trained again"
    for settings in (wanted[0], wanted[2]):
        ahead, origin = tuner.run(settings)
        assert origin == "just tested" and all(tuner.proofs(settings).values())
        other = FineTuner(base, mnist).run(settings, stops=())[0]
        assert (ahead.on.predictions == other.on.predictions).float().mean() > 0.995  # the sums are made in another order
        assert ahead.norms == pytest.approx(other.norms, rel=1e-3)
    done.clear()
    tuner.train_ahead(wanted)
    assert not done


def test_trained_ahead_are_twins_only(base, mnist):
    tuner = FineTuner(base, mnist)
    with pytest.raises(ValueError, match="only rank and alpha may differ"):
        tuner.train_ahead([Settings(batches=5), Settings(batches=5, seed=1)])
    assert not tuner._memory


def test_a_cell_that_turned_gradients_off_is_no_hindrance(base, mnist):
    with torch.no_grad():
        result, origin = FineTuner(base, mnist).run(Settings(batches=5))
    assert origin == "just trained" and result.norms["linear2"] > 0


def test_the_share_of_others_is_exact(mnist):
    for share, others in ((0, 0), (0.1, 33), (0.5, 300), (0.8, 1200)):
        images, labels = finetuning._lesson(mnist.train, Settings(share=share)).tensors
        assert len(images) == len(labels) == 300 + others and (labels != 9).sum() == others


@pytest.mark.parametrize("sizes", [(5, 7, 2), (3, 8, 3), (10, 40, 16)])
def test_singular_values_come_from_the_small_factors(sizes):
    out_features, in_features, rank = sizes
    A, B = torch.randn(rank, in_features, dtype=torch.float64), torch.randn(out_features, rank, dtype=torch.float64)
    found, exact = singular_values(A, B), torch.linalg.svdvals(B @ A)
    assert len(found) == min(sizes) and torch.allclose(found, exact[: len(found)])


def test_the_proofs_hold(tuner):
    for settings in (Settings(), Settings(rank=16, alpha=16), Settings(batches=0)):
        assert all(tuner.proofs(settings).values())


def test_the_proofs_can_fail(base, mnist, monkeypatch):
    def claims(tuner):
        return list(tuner.proofs(Settings(batches=5)).values())

    tuner = FineTuner(base, mnist)
    assert claims(tuner) == [True] * 4
    bias = tuner._net.linear3.bias
    with torch.no_grad():
        bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))  # one bit
    assert claims(tuner)[0] is False
    with torch.no_grad():
        bias += 1
    unmoved, off, low_rank, zero = claims(tuner)
    assert not unmoved and not off and not zero and low_rank
    monkeypatch.setattr(LoRAParametrization, "delta", property(lambda self: torch.ones(self.lora_B.shape[0], self.lora_A.shape[1]).triu()))
    assert claims(tuner)[2:] == [False, False]
    full = torch.randn(30, 20)
    assert not finetuning._has_rank_at_most(full, 4, torch.Generator())
    assert finetuning._has_rank_at_most(torch.randn(30, 4) @ full[:4], 4, torch.Generator())


def test_probabilities_of_base_and_adapted(base, mnist, tuner):
    images = mnist.test.tensors[0][-30:]
    off, on = tuner.probabilities(Settings(), images)
    assert off.shape == on.shape == (30, 10) and torch.allclose(on.sum(dim=1), torch.ones(30))
    with torch.no_grad():
        assert torch.equal(off, base(images).softmax(dim=1))
    assert on[:, 9].mean() > off[:, 9].mean(), "the last images are nines"


def test_memory_is_bounded_and_what_is_forgotten_is_trained_again(base, mnist, monkeypatch):
    monkeypatch.setattr(finetuning, "MEMORY", 2 * 6_794 * 4)  # bytes: two checkpoints of rank 1
    tuner = FineTuner(base, mnist)
    for rank in (1, 2, 1):
        assert tuner.run(Settings(rank=rank, batches=5), stops=())[1] == "just trained"
    assert len(tuner._memory) == 1 and all(tuner.proofs(Settings(rank=2, batches=5)).values())


def test_an_interrupted_training_leaves_nothing_behind(base, mnist):
    tuner = FineTuner(base, mnist)

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.run(Settings(batches=5), progress=stop)
    result, origin = tuner.run(Settings(batches=5))
    assert origin == "just trained"
    assert torch.equal(result.on.predictions, fine_tune(base, mnist, batches=5).on.predictions)


def test_bad_input(base, mnist):
    for name, value in (("batches", -1), ("batches", 2.5), ("seed", True), ("share", 0.9), ("share", "half")):
        with pytest.raises(ValueError, match=f"^{name} is "):
            fine_tune(base, mnist, **{name: value})
    for name, value in (("rank", 0), ("alpha", -1), ("digit", 10)):
        with pytest.raises(ValueError, match=f"^{name} is "):
            fine_tune(base, mnist, **{name: value})
    with pytest.raises(ValueError, match="already has LoRA"):
        fine_tune(add_lora(copy.deepcopy(base)), mnist)


def test_what_is_not_finite_gives_no_figures(base, mnist):
    with pytest.warns(UserWarning, match="diverged"), pytest.raises(ValueError, match="diverged.*smaller alpha"):
        fine_tune(base, mnist, alpha=3e38, batches=5)
    spoiled = copy.deepcopy(base)
    with torch.no_grad():
        spoiled.linear2.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="base holds values that are NaN"):
        fine_tune(spoiled, mnist)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_base_of_another_dtype(mnist, dtype):
    torch.manual_seed(0)
    result = fine_tune(RichBoyNet(20, 30).to(dtype), mnist, rank=2, batches=5)
    assert all(values.dtype == torch.float32 for values in result.singular_values.values())
    assert all(FineTuner(RichBoyNet(20, 30).to(dtype), mnist).proofs(Settings(rank=2, batches=5)).values())


def test_the_proof_of_rank_never_doubts_a_true_rank_and_sees_a_higher_one():
    """Of a wide ΔW: by the tolerance of its narrow product, most of these would be taken for rank 2."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.randn(2, 20_000, generator=generator), torch.randn(4, 2, generator=generator)
        assert not finetuning._has_rank_at_most(B @ A, 1, torch.Generator().manual_seed(0))
        assert finetuning._has_rank_at_most(B[:, :1] @ A[:1], 1, torch.Generator().manual_seed(0))
