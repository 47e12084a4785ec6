"""What labels say of features: k nearest neighbours and a linear probe.

Features `(n, d)` of a bank, whose labels are known, predict the labels of queries. All of it is computed on the CPU and
depends on nothing but its arguments.
"""

import torch
from torch.nn import functional as F

from cap_hf.errors import CAPError

# DINO (arXiv 2104.14294, section 3.2 and appendix F.2): 20 neighbours, weighted by exp(cosine / 0.07).
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Of the linear probe: half of this times the squared weights is added to the mean cross entropy.
PENALTY = 0.01
MOST_STEPS = 200
# Queries whose cosines to the whole bank are in memory at a time.
CHUNK = 512


def check_bank(size: int) -> None:
    """Raise a CAPError if a bank has fewer examples than there are neighbours to find."""
    if size < NEIGHBOURS:
        raise CAPError(
            f"the bank has {size} labelled train images, and k-NN asks the nearest {NEIGHBOURS}: raise "
            "--knn_bank_size or --max_train_samples, or leave the probes out with --knn_bank_size 0"
        )


def nearest_neighbours(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return the labels that the nearest neighbours vote for, as in DINO (arXiv 2104.14294, appendix F.2).

    Args:
        bank: features `(n, d)`.
        labels: of the bank, `(n,)` int64.
        queries: features `(m, d)`.

    Returns:
        Labels, `(m,)` int64; of equal votes the smallest label.

    Raises:
        CAPError: the bank is too small.
    """
    check_bank(len(bank))
    classes, numbers = labels.unique(return_inverse=True)
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    found = []
    for part in queries.split(CHUNK):
        cosines, nearest = (part @ bank.T).topk(NEIGHBOURS)
        votes = torch.zeros(len(part), len(classes), dtype=torch.float64)
        votes.scatter_add_(1, numbers[nearest], (cosines.double() / TEMPERATURE).exp())
        found.append(classes[votes.argmax(dim=1)])
    return torch.cat(found)


def linear_probe(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return the labels by a logistic regression on the bank, of features with mean 0 and deviation 1 in it.

    It minimises the mean cross entropy plus half of `PENALTY` times the squared weights, the bias left free, by L-BFGS
    from 0: what scikit-learn's `LogisticRegression(C=1 / (n * PENALTY))` finds.

    Args:
        bank: features `(n, d)`.
        labels: of the bank, `(n,)` int64.
        queries: features `(m, d)`.

    Returns:
        Labels, `(m,)` int64.
    """
    classes, numbers = labels.unique(return_inverse=True)
    deviation, mean = torch.std_mean(bank.double(), dim=0, correction=0)
    # A channel that is the same everywhere in the bank says nothing.
    scale = torch.where(deviation > 0, 1 / deviation, 0)
    known, asked = ((each.double() - mean) * scale for each in (bank, queries))
    weight = torch.zeros(bank.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=MOST_STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(known @ weight + bias, numbers) + PENALTY / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return classes[(asked @ weight.detach() + bias.detach()).argmax(dim=1)]


PROBES = {"knn_top1": nearest_neighbours, "linear_top1": linear_probe}
