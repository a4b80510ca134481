"""The package imported again in the same process, as notebooks and test runners do."""

from test_registration import python

REIMPORT = """
import importlib, sys, warnings
warnings.simplefilter("error")
import torch
import sts_kernels as first
x = torch.arange(9.0)[None, :, None]
compiled = torch.compile(lambda x: first.repulsion_select(x, 3), backend="eager", fullgraph=True)
query, key = torch.ones(1, 2, 8), torch.ones(1, 4, 1, 8)

def works(package):
    assert package.repulsion_select(x, 3).tolist() == [[4, 0, 8]]
    assert package.last_query_scores(query, key).tolist() == [[0.25] * 4]
    assert package.pairwise_sqdist(x.clone().requires_grad_()).requires_grad
    assert torch.vmap(lambda x: package.repulsion_select(x, 3))(x[None]).tolist() == [[[4, 0, 8]]]
    assert compiled(x).tolist() == [[4, 0, 8]]

works(first)
for _ in range(3):
    for name in [name for name in sys.modules if name.split(".")[0] == "sts_kernels"]:
        del sys.modules[name]
    import sts_kernels
    assert sts_kernels is not first
    works(sts_kernels)
    works(first)
works(importlib.reload(sts_kernels))
importlib.reload(sys.modules["sts_kernels._registry"])
importlib.reload(sys.modules["sts_kernels.ops.repulsion_select"])
works(sts_kernels)
"""


def test_imported_again_and_again():
    python(REIMPORT)


def test_the_newest_import_serves():
    """Reloading an edited module takes effect, in torch.ops too."""
    code = """
        import importlib, pathlib, sys, tempfile, torch
        import sts_kernels
        from sts_kernels import _registry
        def op(value):
            fake = lambda x: torch.empty_like(x)
            @_registry.define_op("edited(Tensor x) -> Tensor", fake=fake, vmap=lambda x: x, discrete=True)
            def reference(x):
                return x + value
        op(1)
        assert torch.ops.sts_kernels.edited(torch.zeros(1)).item() == 1
        op(2)
        assert torch.ops.sts_kernels.edited(torch.zeros(1)).item() == 2
        try:
            _registry.define_op("edited(Tensor y) -> Tensor", fake=None, vmap=None)(None)
        except ImportError as error:
            print(error)
    """
    assert "changed its schema since it was first imported; restart Python" in python(code)
