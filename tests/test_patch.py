"""`train.patch` on a package that has lightly's names, in processes of their own."""

import os
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from sslkern.train import patch, unpatch

SIGNATURE = "lambda_param=25.0, mu_param=25.0, nu_param=1.0, gather_distributed=False, eps=0.0001"
PACKAGE = {
    "__init__": "from lightly import loss",
    "loss/__init__": """
        from lightly.loss.vicreg_loss import VICRegLoss, invariance_loss
        from lightly.loss.barlow_twins_loss import BarlowTwinsLoss
    """,
    "loss/vicreg_loss": f"""
        def invariance_loss(x, y): return "theirs"
        class VICRegLoss:
            def __init__(self, {SIGNATURE}): pass
            def forward(self, z_a, z_b): return "theirs"
    """,
    "loss/barlow_twins_loss": """
        class BarlowTwinsLoss:  # of another version, with one more argument
            def __init__(self, lambda_param=5e-3, gather_distributed=False, power=2): pass
            def forward(self, z_a, z_b): return "theirs"
    """,
}
TRAINER = """
    import lightly.loss
    from lightly.loss import BarlowTwinsLoss, VICRegLoss as Criterion

    class Own(Criterion):
        pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script beside the package and a trainer that imports it; its output."""
    for name, text in {**PACKAGE, "../trainer": TRAINER}.items():
        path = tmp_path / "lightly" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def script(text, *flags):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
        done = subprocess.run([sys.executable, *flags, str(path)], capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return script


def test_names_are_swapped_wherever_they_were_imported(run):
    """In the defining module, in packages, in trainers under another name, in the main module; and back."""
    done = run("""
        import trainer, lightly
        from lightly.loss.vicreg_loss import VICRegLoss
        import sslkern
        from sslkern.train.compat.lightly import VICRegLoss as ours, invariance_loss
        theirs, made = VICRegLoss, VICRegLoss()
        places = lambda: (VICRegLoss, trainer.Criterion, lightly.loss.VICRegLoss, lightly.loss.vicreg_loss.VICRegLoss)
        with sslkern.train.patch("lightly") as patched:
            assert set(places()) == {ours} and lightly.loss.invariance_loss is invariance_loss
            assert made.forward(1, 2) == "theirs" and not issubclass(trainer.Own, ours)
            with sslkern.train.patch("lightly", quiet=True) as again:
                assert again is patched
            assert set(places()) == {ours}  # the end of an inner block does not undo the outer one
            late = __import__("types").ModuleType("late")
            exec("from lightly.loss import VICRegLoss", vars(late))
            __import__("sys").modules["late"] = late
        assert set(places()) == {theirs} and late.VICRegLoss is theirs
        assert lightly.loss.invariance_loss(1, 2) == "theirs"
        assert ours is __import__("sslkern").train.compat.lightly.VICRegLoss
        assert set(patched.swapped["lightly.loss.vicreg_loss.VICRegLoss"]) == {
            "__main__", "trainer", "lightly.loss", "lightly.loss.vicreg_loss"}
        print(patched)
        sslkern.train.unpatch("lightly")  # nothing is patched: no error
    """)
    assert "swapped lightly.loss.vicreg_loss.VICRegLoss" in done.stdout
    assert done.stderr.count(done.stdout.strip()) == 1  # once, as one of the two calls is quiet
    assert "trainer.Own: it was defined as a subclass of lightly.loss.vicreg_loss.VICRegLoss before" in done.stdout
    assert "BarlowTwinsLoss: its arguments here are" in done.stdout and "power" in done.stdout
    assert "the installed version does not have it" in done.stdout


WORKERS = """
    import multiprocessing, sys
    import torch
    import lightly.loss
    import trainer

    class Rows(torch.utils.data.Dataset):
        def __len__(self): return 2
        def __getitem__(self, i): return trainer.Criterion.__module__, lightly.loss.VICRegLoss.__module__

    if __name__ == "__main__":
        import sslkern
        for patched in (True, False):
            if patched:
                sslkern.train.patch("lightly", quiet=True)
            else:
                sslkern.train.unpatch()
            for method in ("spawn", "forkserver"):
                loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context=method)
                for names in loader:
                    assert all(("sslkern" in n[0]) is patched for n in names), (method, patched, names)
        print("done")
"""


def test_spawned_workers_are_patched_too(run):
    """They import the trainer again, and no longer after `unpatch`."""
    assert run(WORKERS).stdout.strip() == "done"


def test_a_package_that_is_not_installed():
    for package in ("solo", "stable_pretraining"):
        if package not in sys.modules:
            with pytest.raises(ModuleNotFoundError, match=rf"patch\('{package}'\) needs .*, which is not installed\."):
                patch(package)


@pytest.mark.parametrize("package", ("pytorch_metric_learning", "", None, 3))
def test_a_package_that_is_not_known(package):
    with pytest.raises(ValueError, match="package must be one of 'lightly', 'solo', 'stable_pretraining', got"):
        patch(package)
    if package is not None:
        with pytest.raises(ValueError, match="package must be one of"):
            unpatch(package)


def test_our_losses_outlive_the_patch(run):
    """A loss that was made while the patch held is pickled under our name, and goes on working after its end."""
    run("""
        import pickle, torch, lightly.loss, sslkern
        with sslkern.train.patch("lightly", quiet=True):
            made = lightly.loss.VICRegLoss(lambda_param=2.0)
        again = pickle.loads(pickle.dumps(made))
        a, b = torch.randn(2, 8, 4)
        assert torch.equal(made(a, b), again(a, b)) and type(again) is not lightly.loss.VICRegLoss
        torch.testing.assert_close(again(a, b), sslkern.vicreg_loss(a, b, 2.0))
    """)
