"""k-NN against a plain loop, the linear probe against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cap_hf.data import probes
from cap_hf.data.probes import PENALTY, linear_probe, nearest_neighbours
from cap_hf.errors import CAPError


def clouds(count: int, seed: int, classes: int = 5, channels: int = 12):
    """Features of overlapping classes, some channels far larger than others and one constant; labels 10, 20, ..."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(classes, channels, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(count, channels, generator=generator)
    features *= torch.logspace(-2, 2, channels)
    features[:, 3] = 4.0
    return features, 10 * (labels + 1)


def test_neighbours_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(probes, "CHUNK", 16)
    bank, labels = clouds(90, 0)
    queries, _ = clouds(50, 1)
    expected = []
    for query in queries.double():
        cosines = [float(query @ each / (query.norm() * each.norm())) for each in bank.double()]
        votes = {int(label): 0.0 for label in labels}
        for place in sorted(range(len(bank)), key=lambda place: -cosines[place])[:20]:
            votes[int(labels[place])] += math.exp(cosines[place] / 0.07)
        expected.append(max(votes, key=votes.get))
    found = nearest_neighbours(bank, labels, queries)
    assert found.tolist() == expected
    assert len(set(expected)) > 2


def test_near_neighbours_outweigh_many():
    """5 of one class at cosine 1 against 15 of another at 0.9, which lose though they are more."""
    bank = torch.cat([torch.tensor([[1.0, 0.0]]).expand(5, 2), torch.tensor([[0.9, math.sqrt(0.19)]]).expand(15, 2)])
    labels = torch.tensor([3] * 5 + [1] * 15)
    assert nearest_neighbours(bank, labels, torch.tensor([[2.0, 0.0]])).tolist() == [3]


def test_a_small_bank_is_refused():
    bank, labels = clouds(19, 0)
    with pytest.raises(CAPError, match="the bank has 19 labelled train images, and k-NN asks the nearest 20: raise"):
        nearest_neighbours(bank, labels, bank)


def test_the_linear_probe_is_that_of_scikit_learn():
    bank, labels = clouds(200, 0)
    queries, _ = clouds(300, 1)
    scaler = StandardScaler().fit(bank.double().numpy())
    reference = LogisticRegression(C=1 / (len(bank) * PENALTY), tol=1e-8, max_iter=5000)
    reference.fit(scaler.transform(bank.double().numpy()), labels.numpy())
    expected = reference.predict(scaler.transform(queries.double().numpy()))
    found = linear_probe(bank, labels, queries)
    assert np.mean(found.numpy() == expected) >= 0.99
    assert len(set(expected)) == 5
    assert torch.equal(found, linear_probe(bank, labels, queries))


def test_a_bank_of_one_class_and_a_caller_without_gradients():
    bank, labels = clouds(40, 0)
    assert linear_probe(bank, torch.full((40,), 7), bank).tolist() == [7] * 40
    with torch.no_grad():
        found = linear_probe(bank, labels, bank)
    assert torch.equal(found, linear_probe(bank, labels, bank))
    assert len(found.unique()) > 1
