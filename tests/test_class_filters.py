"""The result table: selection, comparison, files."""

import copy
import errno
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from captum_classfilters import ClassFilters, LayerFilterContribution
from tests.models import QUIET, batches, deep

SCORES = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 5.0, 5.0, -1.0], [1.0, 1.0, 1.0, 1.0]])


def table(scores=SCORES, counts=None, **options):
    counts = torch.full((len(scores),), 10) if counts is None else counts
    return ClassFilters(scores, counts, **options)


def full_table():
    return table(
        class_names=["cat", "dog", "fox"],
        standard_errors=SCORES.abs(),
        layer="conv",
        method="Example",
        provenance={"options": {"top_k": 5}, "nested": [1, 2]},
    ).select(2)


def test_classes_with_images_are_printed_first():
    scores = torch.full((50, 3), torch.nan)
    scores[[44, 7]] = torch.tensor([[1.0, 2.0, 0.0], [5.0, 4.0, 3.0]])
    counts = torch.zeros(50).scatter(0, torch.tensor([44, 7]), 3.0)
    rows = str(table(scores, counts)).splitlines()[2:]
    assert [row.split()[0] for row in rows[:4]] == ["7", "44", "0", "1"]
    assert rows[0].split()[1] == rows[1].split()[1] == "3"
    assert len(table(scores, counts).to_pandas()) == 150


class TestSelect:
    def test_by_number_with_ties_to_the_lower_filter(self):
        chosen = table().select(num_filters=2)
        assert [chosen.filters_of(row).tolist() for row in range(3)] == [[0, 2], [1, 2], [0, 1]]
        assert chosen.classes_of(2) == ["0", "1"]

    def test_by_mass_is_the_smallest_set_that_reaches_it(self):
        # Positive masses: 3+1+2+2 = 8, 10, 4.
        chosen = table().select(mass=0.6)
        assert [chosen.filters_of(row).tolist() for row in range(3)] == [[0, 2], [1, 2], [0, 1, 2]]
        assert table().select(mass=1e-9).selected.sum(1).tolist() == [1, 1, 1]
        assert table().select(mass=1.0).selected.sum(1).tolist() == [4, 2, 4]

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 5), st.integers(1, 12), st.floats(0.01, 1.0), st.integers(0, 999))
    def test_mass_property(self, classes, filters, mass, seed):
        scores = torch.rand(classes, filters, generator=torch.Generator().manual_seed(seed)) + 0.01
        chosen = table(scores).select(mass=mass)
        for row in range(classes):
            kept = scores[row].double()[chosen.filters_of(row)]
            need = mass * scores[row].double().sum()
            assert kept.sum() >= need * (1 - 1e-9)
            assert kept[:-1].sum() < need
            assert len(kept) >= 1

    def test_class_without_images_is_kept_marked_and_never_selected(self):
        scores = SCORES.clone()
        scores[1] = float("nan")
        empty = table(scores, counts=torch.tensor([4, 0, 4]))
        assert empty.classes_without_images == ["1"]
        with pytest.warns(UserWarning, match="1 class.* without images: 1"):
            chosen = empty.select(2)
        assert chosen.selected.sum(1).tolist() == [2, 0, 2]
        with pytest.warns(UserWarning, match="without images"):
            assert empty.select(mass=0.5).filters_of(1).tolist() == []
        with pytest.raises(ValueError, match="without images"):
            empty.with_selection(torch.ones(3, 4, dtype=torch.bool))

    def test_zero_and_negative_scores_are_told_unless_all_are_asked_for(self):
        found = table(torch.tensor([[0.0, 0, 0, 0], [1, -2, -1, 3]]), counts=torch.tensor([4, 4]))
        with pytest.warns(UserWarning, match="Every score .* zero for 1 class, so .*: 0"):
            chosen = found.select(2)
        assert chosen.selected.tolist() == [[False] * 4, [True, False, False, True]]
        with pytest.warns(UserWarning, match="negative scores.* 1 class: 1"):
            found.select(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert found.select(4).selected.all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_filters": 5}, "num_filters=5 is out of range: .* has 4 filters"),
            ({"num_filters": 0}, "out of range"),
            ({"num_filters": 2.5}, "expected a whole number"),
            ({"mass": 0.0}, "mass=0.0 is out of range"),
            ({"mass": 1.1}, "out of range"),
            ({}, "exactly one"),
            ({"mass": 0.5, "num_filters": 1}, "exactly one"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            table().select(**options)


class TestReading:
    def test_is_immutable(self):
        one = full_table()
        one.scores.zero_()
        one.selected.zero_()
        assert torch.equal(one.scores, SCORES.double())
        assert one.selected.any()
        with pytest.raises(AttributeError, match="immutable"):
            one.layer = "other"
        with pytest.raises(TypeError):
            one.provenance["options"] = 1

    def test_does_not_share_memory_with_what_it_was_made_of(self):
        scores = SCORES.double()
        one = table(scores)
        scores.zero_()
        assert torch.equal(one.scores, SCORES.double())

    def test_names_and_ranges(self):
        one = full_table()
        assert one.filters_of("dog").tolist() == [1, 2]
        with pytest.raises(ValueError, match="No class named 'cow'"):
            one.filters_of("cow")
        with pytest.raises(ValueError, match="Class 3 is out of range"):
            one.filters_of(3)
        with pytest.raises(ValueError, match="Filter 4 is out of range"):
            one.classes_of(4)

    def test_copies(self):
        one = full_table()
        assert copy.deepcopy(one) == one
        assert pickle.loads(pickle.dumps(one)) == one
        assert "2 filters selected per class" in repr(one)

    def test_to_pandas(self):
        frame = full_table().to_pandas()
        assert len(frame) == 12
        row = frame[(frame["class"] == "dog") & (frame["filter"] == 1)].iloc[0]
        assert row["score"] == 5.0
        assert row["selected"]
        assert row["images"] == 10
        assert row["standard_error"] == 5.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"counts": torch.tensor([1, 1])}, "3 numbers of images"),
            ({"selected": torch.ones(3, 4)}, "bool"),
            ({"selected": torch.ones(3, 3, dtype=torch.bool)}, "selected has shape"),
            ({"standard_errors": torch.ones(2, 4)}, "standard_errors has shape"),
            ({"class_names": ["a", "b"]}, "class_names has 2 names; expected 3"),
            ({"class_names": ["a", "b", "a"]}, "different names"),
            ({"class_names": "abc"}, "class_names='abc' is one name; expected a sequence"),
            ({"scores": torch.ones(3)}, "expected .C, K."),
            ({"scores": torch.full((3, 4), float("inf"))}, "NaN or Inf"),
            ({"scores": SCORES.numpy()}, "scores is a ndarray; expected a Tensor"),
            ({"counts": [10, 20, 30]}, "counts is a list; expected a Tensor"),
            ({"selected": ("a", "b", "c")}, "selected is a tuple; expected a Tensor"),
        ],
    )
    def test_bad_tables(self, options, message):
        arguments: dict[str, Any] = {"scores": SCORES, "counts": torch.ones(3), **options}
        with pytest.raises(ValueError, match=message):
            ClassFilters(**arguments)


class TestComparing:
    def test_agreement_with_itself_and_chance(self):
        one = table(torch.rand(4, 20)).select(5)
        same = one.agreement(one)
        assert same.overlap.tolist() == [1.0] * 4
        assert same.chance.tolist() == [0.25] * 4
        assert same.mean_rank_correlation == pytest.approx(1.0)

    def test_chance_level_is_what_random_sets_share(self):
        torch.manual_seed(0)
        shares = []
        for _ in range(200):
            one, two = table(torch.rand(5, 12)).select(3), table(torch.rand(5, 12)).select(6)
            agreement = one.agreement(two)
            shares.append(agreement.mean_overlap)
        assert np.mean(shares) == pytest.approx(agreement.mean_chance, abs=0.03)

    def test_rank_correlation_is_scipys(self):
        left, right = torch.rand(3, 15), torch.rand(3, 15).round(decimals=1)
        agreement = table(left).agreement(table(right), num_filters=4)
        expected = [spearmanr(a, b).statistic for a, b in zip(left, right, strict=True)]
        assert agreement.rank_correlation.tolist() == pytest.approx(expected, abs=1e-5)

    def test_overlap_between_classes(self):
        overlap = table().select(2).overlap()
        assert overlap.count.tolist() == [[2, 1, 1], [1, 2, 1], [1, 1, 2]]
        assert overlap.jaccard[0].tolist() == pytest.approx([1, 1 / 3, 1 / 3])
        assert overlap.classes_per_filter.tolist() == [2, 2, 2, 0]

    @pytest.mark.parametrize("fits", [["cat", "dog", "fox"], ["0", "1", "2"], None])
    @pytest.mark.parametrize("differs", [["fox", "cat", "dog"], ["cat", "dog", "wolf"]])
    def test_refuses_classes_of_other_names(self, fits, differs):
        scores, counts = torch.rand(3, 5), torch.tensor([4, 5, 6])
        one, same, other = (
            ClassFilters(scores, counts, class_names=names).select(2)
            for names in (["cat", "dog", "fox"], fits, differs)
        )
        assert one.agreement(same).mean_overlap == 1
        assert same.agreement(one).mean_rank_correlation == pytest.approx(1)
        with pytest.raises(ValueError, match=r"class \d is '(cat|fox)' in one and '(fox|wolf)'"):
            one.agreement(other)

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match="only equal shapes"):
            table().agreement(table(torch.rand(3, 5)))


class TestFiles:
    def test_round_trip(self, tmp_path):
        one, path = full_table(), tmp_path / "table.safetensors"
        one.save(path)
        assert ClassFilters.load(path) == one
        with pytest.raises(FileExistsError, match="overwrite=True"):
            one.save(path)
        other = one.select(1)
        other.save(path, overwrite=True)
        assert ClassFilters.load(path) == other
        assert os.listdir(tmp_path) == ["table.safetensors"]

    def test_full_disk_keeps_the_old_file(self, tmp_path, monkeypatch):
        one, path = full_table(), tmp_path / "table.safetensors"
        one.save(path)

        def full(_handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            one.select(1).save(path, overwrite=True)
        assert ClassFilters.load(path) == one
        assert os.listdir(tmp_path) == ["table.safetensors"]

    def test_foreign_truncated_and_newer_files(self, tmp_path):
        path = tmp_path / "table.safetensors"
        with pytest.raises(FileNotFoundError, match="no file"):
            ClassFilters.load(path)
        full_table().save(path)
        whole = path.read_bytes()
        for content in (whole[:50], whole[:-20], b"", b"not a table at all", b"\x00" * 100):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="not a complete ClassFilters file"):
                ClassFilters.load(path)
        save_file({"x": torch.ones(2)}, path)
        with pytest.raises(ValueError, match="does not hold a ClassFilters table"):
            ClassFilters.load(path)

    def test_newer_schema_and_missing_parts(self, tmp_path):
        path = tmp_path / "table.safetensors"
        full_table().save(path)
        tensors = load_file(path)
        metadata = {"schema": "captum_classfilters.ClassFilters", "schema_version": 99}
        save_file(tensors, path, metadata={"class_filters": json.dumps(metadata)})
        with pytest.raises(ValueError, match="schema version 99"):
            ClassFilters.load(path)
        metadata["schema_version"] = 1
        save_file(tensors, path, metadata={"class_filters": json.dumps(metadata)})
        with pytest.raises(ValueError, match="lacks parts"):
            ClassFilters.load(path)

    def test_pickles_do_not_run(self, tmp_path):
        path, proof = tmp_path / "table.safetensors", tmp_path / "proof"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(proof),)

        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match="not a complete"):
            ClassFilters.load(path)
        assert not proof.exists()


class TestSignificance:
    Q_VALUES = torch.tensor(
        [[0.01, 0.2, 0.05, 0.04], [0.01, 0.06, 0.03, 0.01], [0.9, 0.9, 0.9, 0.9]],
        dtype=torch.float64,
    )

    def significant(self, **options):
        return table(p_values=self.Q_VALUES / 2, q_values=self.Q_VALUES, **options)

    def test_discoveries_are_positive_cells_up_to_the_rate(self):
        chosen = self.significant().select(fdr=0.05)
        # Filter 0 of class 1 has a score of 0, its filter 3 one of -1; class 2 has none.
        assert [chosen.filters_of(row).tolist() for row in range(3)] == [[0, 2, 3], [2], []]
        assert torch.equal(chosen.q_values, self.Q_VALUES)
        loose = self.significant().select(fdr=0.06)
        assert loose.filters_of(1).tolist() == [1, 2]

    def test_at_most_so_many_discoveries(self):
        chosen = self.significant().select(num_filters=2, fdr=0.05)
        assert [chosen.filters_of(row).tolist() for row in range(3)] == [[0, 2], [2], []]

    def test_classes_without_images_discover_nothing(self):
        scores, q_values = SCORES.clone(), self.Q_VALUES.clone()
        scores[1] = q_values[1] = float("nan")
        found = ClassFilters(scores, torch.tensor([5, 0, 5]), q_values=q_values)
        assert found.select(fdr=0.05).selected[1].sum() == 0

    def test_bad_rules(self):
        with pytest.raises(ValueError, match="no q-values; identify with significance=True"):
            table().select(fdr=0.05)
        with pytest.raises(ValueError, match="fdr=5 is out of range"):
            self.significant().select(fdr=5)
        with pytest.raises(ValueError, match="not with mass"):
            self.significant().select(fdr=0.05, mass=0.5)
        with pytest.raises(ValueError, match="num_filters=9 is out of range"):
            self.significant().select(fdr=0.05, num_filters=9)
        with pytest.raises(
            ValueError, match=r"p_values of classes with images must lie in \[0, 1\]"
        ):
            table(p_values=SCORES)
        with pytest.raises(ValueError, match="q_values has shape"):
            table(q_values=self.Q_VALUES[:, :2])

    def test_kept_in_files_copies_and_frames(self, tmp_path):
        found = self.significant(standard_errors=SCORES.abs()).select(fdr=0.05)
        found.save(tmp_path / "a.safetensors")
        for other in (
            ClassFilters.load(tmp_path / "a.safetensors"),
            pickle.loads(pickle.dumps(found)),
            copy.deepcopy(found),
        ):
            assert other == found
            assert other.p_values is not None
            assert torch.equal(other.p_values, found.p_values)
        assert found != table(standard_errors=SCORES.abs()).with_selection(found.selected)
        frame = found.to_pandas()
        np.testing.assert_allclose(frame["q_value"], found.q_values.flatten())
        np.testing.assert_allclose(frame["p_value"], found.p_values.flatten())
        assert "q_value" not in table().to_pandas()

    def test_files_without_significance_are_those_of_schema_one(self, tmp_path):
        """So that they can be read by versions that know no significance, and the reverse."""
        for name, one, version in (("old", full_table(), 1), ("new", self.significant(), 2)):
            one.save(tmp_path / name)
            with safe_open(tmp_path / name, framework="pt") as file:
                metadata = json.loads(file.metadata()["class_filters"])
            assert metadata["schema_version"] == version
        assert ClassFilters.load(tmp_path / "old").q_values is None


def test_warnings_point_at_the_users_line():
    """Also from deep inside, where a table is selected from by another function."""
    model, data = deep(), batches()
    few = [(x, torch.zeros_like(y)) for x, y in data]
    method = LayerFilterContribution(model, "stage2")
    with pytest.warns(UserWarning, match="without images") as caught:
        method.identify(few, **QUIET).select(num_filters=2)
    assert len(caught) >= 2
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}


def test_intervals_of_scores_are_students():
    """As SciPy has them for the mean of a sample; unknown for a single image."""
    from scipy import stats

    sample = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    error = sample.std() / 2
    table = ClassFilters(
        torch.stack([sample.mean(), sample.mean()])[:, None],
        counts=torch.tensor([4, 1]),
        standard_errors=torch.stack([error, error])[:, None],
    )
    low, high = stats.t.interval(0.9, 3, float(sample.mean()), float(error))
    assert torch.allclose(table.interval(0.9)[0, 0], torch.tensor([low, high]).double())
    assert bool(table.interval()[1].isnan().all())
    with pytest.raises(ValueError, match=r"confidence=1.0 must lie between"):
        table.interval(1.0)
    bare = ClassFilters(torch.ones(1, 1), counts=torch.tensor([4]))
    assert bool(bare.interval().isnan().all())
