"""The shared pipeline: settings, splits, loaders."""

from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from vit_attn.data import ImageData
from vit_attn.data.digits import Digits
from vit_attn.errors import UserError

NUM_IMAGES = 100


class Counted(ImageData):
    """Image i shows the value i, so that a batch says which images it holds. 60 of class a, 40 of class b."""

    default_image_size = 4
    default_mean = default_std = (0.5, 0.5, 0.5)

    def find_classes(self):
        return ["a", "b"]

    def load_train(self):
        pixels = torch.arange(NUM_IMAGES, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
        return self.in_memory(pixels, (torch.arange(NUM_IMAGES) % 5 > 2).long())

    def load_test(self):
        return self.load_train().subset(range(10))


def loaded(stage="fit", trainer=None, **settings):
    data = Counted(**settings)
    data.trainer = trainer
    data.setup(stage)
    return data


def shown(loader):
    """Image numbers per batch."""
    return [images[:, 0, 0, 0].tolist() for images, _ in loader]


def flat(loader):
    return [number for batch in shown(loader) for number in batch]


def test_validation_is_stratified_disjoint_and_fixed():
    data = loaded(val_fraction=0.2, seed=1)
    train, val = set(flat(data.train_dataloader())), flat(data.val_dataloader())
    assert (len(train), len(val)) == (80, 20)
    assert not train & set(val)
    assert train | set(val) == set(range(NUM_IMAGES))
    assert sum(number % 5 > 2 for number in val) == 8
    other_seed, other_split = loaded(val_fraction=0.2, seed=2), loaded(val_fraction=0.2, split_seed=1)
    assert flat(other_seed.val_dataloader()) == val
    assert flat(other_split.val_dataloader()) != val


def test_labels_go_with_their_images():
    for images, labels in loaded(batch_size=16).train_dataloader():
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert ((images[:, 0, 0, 0] % 5 > 2) == labels.bool()).all()


def test_order_of_training_follows_seed_and_epoch():
    def epochs(seed):
        loader = loaded(batch_size=16, seed=seed).train_dataloader()
        result = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            result.append(shown(loader))
        return result

    assert epochs(0) == epochs(0)
    assert epochs(0)[0] != epochs(0)[1]
    assert epochs(0) != epochs(1)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    shown(loaded(batch_size=16).train_dataloader())
    assert torch.equal(torch.rand(3), expected)


def test_ranks_come_from_the_trainer():
    def place(rank):
        return SimpleNamespace(global_rank=rank, world_size=2, current_epoch=3)

    alone = loaded(batch_size=16)
    loader = alone.train_dataloader()
    loader.sampler.set_epoch(3)
    ranks = [loaded(batch_size=8, trainer=place(rank)) for rank in range(2)]
    halves = zip(*(shown(data.train_dataloader()) for data in ranks), strict=True)
    assert [a + b for a, b in halves] == shown(loader)
    tested = [flat(data.test_dataloader()) for data in ranks]
    assert tested == [list(range(0, 10, 2)), list(range(1, 10, 2))]


def test_start_batch_goes_to_the_next_loader_once():
    data = loaded(batch_size=16)
    whole = shown(data.train_dataloader())
    data.start_batch = 2
    assert shown(data.train_dataloader()) == whole[2:]
    assert shown(data.train_dataloader()) == whole


def test_setup_for_testing_loads_only_test():
    data = loaded("test")
    assert data.describe()["num_images"] == {"test": 10}
    assert (data.num_classes, data.class_names, data.image_size, data.in_chans) == (2, ["a", "b"], 4, 3)
    data.setup("fit")
    assert data.describe()["num_images"] == {"train": 90, "val": 10, "test": 10}


def test_setup_twice_loads_once():
    data = loaded()
    data.load_train = data.load_test = None  # would fail if called
    data.setup("fit")
    data.setup("test")


def test_describe_survives_a_safe_checkpoint(tmp_path):
    description = loaded().describe()
    torch.save(description, tmp_path / "d.pt")
    assert torch.load(tmp_path / "d.pt", weights_only=True) == description


@pytest.mark.parametrize("budget", [4.0, 0.0])
def test_image_size_within_and_beyond_the_cache(budget):
    data = loaded(image_size=9, cache_budget=budget, batch_size=16)
    assert data._train.streams == (budget == 0)
    batches = shown(data.train_dataloader())
    assert batches == shown(loaded(batch_size=16).train_dataloader())
    assert next(iter(data.train_dataloader()))[0].shape == (16, 3, 9, 9)


def test_workers_change_nothing():
    batches = [
        shown(loaded(image_size=9, cache_budget=0, batch_size=16, num_workers=workers).train_dataloader())
        for workers in (0, 2)
    ]
    assert batches[0] == batches[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": "many"}, "data.batch_size must be a whole number of at least 1, not 'many'"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be a whole number of at least 1, not 0"),
        ({"image_size": 0}, "data.image_size must be"),
        ({"val_fraction": 1.0}, "data.val_fraction must be a number of at least 0 and below 1, not 1.0"),
        ({"val_fraction": -0.1}, "data.val_fraction must be"),
        ({"on_error": "skp"}, "unknown data.on_error 'skp'. Did you mean 'skip'? Allowed: stop, skip."),
        ({"num_workers": -1}, "data.num_workers must be"),
        ({"cache_budget": -1}, "data.cache_budget must be"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"mean": [0.5]}, "data.mean must be three numbers"),
        ({"std": [0.5, 0.5, 0.0]}, "data.std must be three positive numbers"),
        ({"augment": {"flipp": True}}, "unknown option of data.augment 'flipp'. Did you mean 'flip'?"),
        ({"val_fraction": 0}, "data.val_fraction=0 leaves no validation images"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError) as error:
        Counted(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_validation_too_small_to_carve():
    with pytest.raises(UserError, match=r"data.val_fraction=0.005 cannot be carved from 100 .* of 2 classes"):
        loaded(val_fraction=0.005)


def compose_data(name, *overrides):
    folder = Path(__file__).parents[2] / "conf" / "data"
    with initialize_config_dir(str(folder), version_base=None):
        return compose(name, overrides=list(overrides))


def test_yaml_and_class_agree_on_digits():
    made = instantiate(compose_data("digits"), seed=4)
    made.setup("test")
    plain = Digits(seed=4)
    plain.setup("test")
    assert isinstance(made, Digits)
    assert made.make_augment().options == plain.make_augment().options
    assert not made.make_augment().options.flip
    for name in ("batch_size", "val_fraction", "seed", "on_error", "mean", "std", "image_size"):
        assert getattr(made, name) == getattr(plain, name), name


def test_yaml_values_reach_the_pipeline(monkeypatch):
    monkeypatch.setenv("VIT_ATTN_DATA", "/somewhere")
    overrides = ["augment.mixup=0.8", "augment.crop=none", "mean=[0.1,0.2,0.3]", "batch_size=7"]
    data = instantiate(compose_data("cifar10", *overrides), seed=0)
    assert str(data.root) == "/somewhere"
    assert (data.mean, data.batch_size) == ((0.1, 0.2, 0.3), 7)
    assert (data.augment_options["mixup"], data.augment_options["crop"]) == (0.8, "none")


class Recorder(lightning.LightningModule):
    """Keeps (epoch, step in the epoch, images) and saves once, in the middle of an epoch."""

    def __init__(self, save_at=None, path=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save_at, self.path, self.seen = save_at, path, []

    def training_step(self, batch, step):
        self.seen.append((self.current_epoch, step, batch[0][:, 0, 0, 0].tolist()))
        return self.layer(torch.ones(1)).sum()

    def on_train_batch_end(self, *_):
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        assert (
            self.trainer.estimated_stepping_batches == 15
        )  # makes the loader before Lightning knows of the checkpoint
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_fit_resumed_inside_an_epoch_sees_the_same_batches(tmp_path, workers):
    def fit(module, start=(0, 0), checkpoint=None):
        data = Counted(image_size=9, cache_budget=0, num_workers=workers, batch_size=16)
        data.start_epoch, data.start_batch = start
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", use_distributed_sampler=False, **dict.fromkeys(quiet, False)
        )
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return module.seen

    path = tmp_path / "a.ckpt"
    uninterrupted = fit(Recorder(save_at=8, path=path))  # 90 images: 5 batches per epoch
    assert len(uninterrupted) == 15
    assert fit(Recorder(), start=(1, 3), checkpoint=path) == uninterrupted[8:]
