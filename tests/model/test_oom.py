import pytest
import torch

from grpo.model.oom import TokenBudget, out_of_memory


def runs_out_above(limit, sizes):
    """A function that fits in memory with at most `limit` tokens; it appends each size tried to `sizes`."""

    def work(tokens):
        sizes.append(tokens)
        if tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return tokens

    return work


def test_the_budget_is_halved_until_the_work_fits_and_stays_reduced():
    sizes, budget = [], TokenBudget("update", 13)
    assert budget.state_dict() == {}
    assert budget.run(runs_out_above(4, sizes), 1, 100) == 3
    assert budget.run(runs_out_above(4, sizes), 1, 100) == 3
    assert sizes == [13, 6, 3, 3]
    assert budget.state_dict() == {"from": 13, "to": 3}


def test_a_reduced_budget_is_restored_only_if_the_configured_budget_is_unchanged():
    for configured, tokens in ((8, 2), (16, 16)):  # the second was set by the user after the reduction
        budget = TokenBudget("update", configured)
        budget.load_state_dict({"from": 8, "to": 2})
        assert budget.tokens == tokens


def test_a_budget_larger_than_the_work_is_reduced_to_half_of_the_work():
    sizes, budget = [], TokenBudget("update", 10**6)
    budget.run(runs_out_above(500, sizes), 100, 900)
    assert sizes == [10**6, 450]
    assert budget.state_dict() == {"from": 10**6, "to": 450}


def test_one_completion_that_does_not_fit_is_an_error_with_a_suggested_fix():
    sizes = []
    with pytest.raises(RuntimeError, match=r"out of memory in the rollout with one completion at a time; lower grpo"):
        TokenBudget("rollout", 200).run(runs_out_above(0, sizes), 60, 1000)
    assert sizes == [200, 100, 50]


def test_other_errors_are_raised_unchanged():
    def work(tokens):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        TokenBudget("update", 4).run(work, 1, 4)


def test_out_of_memory_errors_are_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    for library, call in (
        ("CUBLAS", "cublasSgemm( handle )"),
        ("CUDNN", "cudnnCreate(&h)"),
        ("CUSOLVER", "x( handle )"),
    ):
        assert out_of_memory(RuntimeError(f"CUDA error: {library}_STATUS_ALLOC_FAILED when calling `{call}`"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"))
    assert out_of_memory(RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"))
    assert not out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
