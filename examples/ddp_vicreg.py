"""VICReg on real digits (scikit-learn's) over several processes, with the gradient of the joint batch.

The check comes first. In fp64, it compares the gradient that DistributedDataParallel averages over the processes with
the gradient of one process on the joint batch. Training follows, with a checkpoint that resumes bit for bit, and a
linear probe. Step s sees the same images for any number of processes. CPUs use gloo, GPUs use NCCL.

    torchrun --nproc-per-node 2 examples/ddp_vicreg.py               under a minute on two cores
    torchrun --nproc-per-node 2 examples/ddp_vicreg.py --fsdp        the projector sharded by FSDP2 (fully_shard)
    torchrun --nproc-per-node 2 examples/ddp_vicreg.py --chunk 32    the encoder in chunks, replayed in the backward
    python examples/ddp_vicreg.py                                    the same in one process
    python examples/ddp_vicreg.py --quick                            a short form of 30 steps

Stop and resume, which gives the digest of a run without a stop:

    torchrun --nproc-per-node 2 examples/ddp_vicreg.py --stop-after 50
    torchrun --nproc-per-node 2 examples/ddp_vicreg.py --resume

Source: Bardes et al., VICReg (2105.04906).
"""

import argparse
import copy
import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from _digits import build_network, features, probe, split_digits, two_views
from _flags import parse
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sslkern
from sslkern.nn import SyncBatchNorm

SIZES = {"hidden": 512, "width": 512, "batch": 256, "steps": 150}
QUICK = {"steps": 30}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
EXACT = 1e-12  # largest error that passes, relative to the largest gradient, in fp64


class Network(nn.Module):
    """The encoder on both views together, whole or in chunks, then the projector on each view."""

    def __init__(self, args):
        super().__init__()
        self.encoder, _ = build_network(args)
        self.projector = nn.Sequential(
            *(nn.Linear(512, args.hidden), nn.BatchNorm1d(args.hidden), nn.ReLU()),
            nn.Linear(args.hidden, args.width),
        ).to(args.device)
        self.chunk = args.chunk

    def forward(self, a, b):
        views = torch.cat([a, b])
        z = sslkern.large_batch(self.encoder, views, chunk_size=self.chunk) if self.chunk else self.encoder(views)
        return [self.projector(part) for part in z.chunk(2)]


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def distributed(network, args):
    """The network with synchronised batch norm, wrapped in DDP or sharded; unchanged in a single process."""
    if not dist.is_initialized():
        return network
    network = SyncBatchNorm.convert_sync_batchnorm(network)
    devices = [args.device] if args.device.type == "cuda" else None
    if args.fsdp:
        fully_shard(network.projector, mesh=init_device_mesh(args.device.type, (world_size(),)))
        network.encoder = DistributedDataParallel(network.encoder, device_ids=devices)
        return network
    return DistributedDataParallel(network, device_ids=devices)


def views_of(args, images, step):
    """Two views of the images of all processes; they depend on the seed and the step only."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    return two_views(images, args.batch, generator, args.device)


def mine(views):
    """This process's share of the rows; shares differ by at most one row."""
    return [view.tensor_split(world_size())[rank()] for view in views]


def whole(x):
    """The full tensor, if x may be sharded."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gradients(network, views, group):
    sslkern.vicreg_loss(*network(*views), group=group).backward()
    return torch.cat([whole(p.grad).flatten() for p in network.parameters()])


def largest_difference(args, images):
    """The largest error of the joint gradient against one process, in fp64, relative to the largest gradient."""
    views = [view.double() for view in views_of(args, images, 0)]
    one = Network(args).double()
    all_of_them = distributed(copy.deepcopy(one), args)
    expected, found = gradients(one, views, None), gradients(all_of_them, mine(views), "world")
    return float((found - expected).abs().max() / expected.abs().max())


def save(args, network, optimizer, step):
    """Write the checkpoint from rank 0, by renaming a temporary file."""
    model, optimizing = get_state_dict(network, optimizer, options=WHOLE)
    if rank() == 0:
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = args.checkpoint.with_suffix(".partial")
        torch.save({"step": step, "model": model, "optimizer": optimizing}, partial)
        partial.replace(args.checkpoint)


def load(args, network, optimizer):
    saved = torch.load(args.checkpoint, map_location=args.device)
    parts = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    set_state_dict(network, optimizer, **parts, options=StateDictOptions(full_state_dict=True))
    return saved["step"]


def digest(network):
    """A hash of every bit of the parameters and the running statistics."""
    model = [*network.parameters(), *network.buffers()]
    return hashlib.sha256(b"".join(whole(t.detach()).cpu().numpy().tobytes() for t in model)).hexdigest()[:16]


def train(args, images):
    """Train from the checkpoint, if --resume, to the last step. Returns the network and that step."""
    network = distributed(Network(args), args)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    done = load(args, network, optimizer) if args.resume else 0
    end = min(args.steps, args.stop_after or args.steps)
    loss = torch.zeros((), device=args.device)
    for step in (bar := tqdm(range(done, end), desc="vicreg", ncols=90, disable=rank() > 0)):
        loss = sslkern.vicreg_loss(*network(*mine(views_of(args, images, step))), group="world")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix_str(f"loss of rank 0 {loss.item():.3f}")
    save(args, network, optimizer, end)
    return network, end


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same run; default 0")
    parser.add_argument("--chunk", type=int, default=0, metavar="N", help="images per encoder chunk; default all")
    parser.add_argument("--fsdp", action="store_true", help="shard the projector by fully_shard")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/ddp_vicreg.pt"), metavar="PT")
    parser.add_argument("--stop-after", type=int, default=0, metavar="N", help="end early, at this step")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint")
    args = parse(parser, QUICK)
    args.processes = int(os.environ.get("WORLD_SIZE", "1"))
    for name, least in (("hidden", 1), ("width", 2), ("batch", max(2, args.processes)), ("steps", 1), ("chunk", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if args.stop_after < 0:
        parser.error(f"--stop-after must be at least 0, got {args.stop_after}.")
    if args.fsdp and args.processes == 1:
        parser.error("--fsdp shards over processes: start it by torchrun --nproc-per-node 2.")
    if args.resume and not args.checkpoint.exists():
        parser.error(f"--resume needs a checkpoint, and {args.checkpoint} is not there.")
    return args


def start(args):
    """Set this process's device, and join the process group if there are several processes."""
    cuda = torch.cuda.is_available()
    args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(args.device)
    if args.processes > 1:
        dist.init_process_group("nccl" if cuda else "gloo")


def main():
    args = parse_arguments()
    start(args)
    data = split_digits(args.seed)
    error = largest_difference(args, data[0])
    network, end = train(args, data[0])
    bits = digest(network)
    passed = error <= EXACT
    if rank() == 0:
        encoder = {name.removeprefix("module."): part for name, part in network.named_modules()}["encoder"]
        raw = probe(*(images.flatten(1).numpy() for images in data[:2]), *data[2:])
        trained = probe(*features(nn.Sequential(encoder), *data[:2]), *data[2:])
        how = "gloo" if args.device.type == "cpu" else "NCCL"
        print(f"\n{args.processes} processes, {how if args.processes > 1 else 'no group'}, {args.device.type}")
        print(f"linear probe after step {end}: {trained[0]:.3f} with all labels, {trained[1]:.3f} with 5 per class")
        print(f"            of raw pixels: {raw[0]:.3f}                  {raw[1]:.3f}")
        print(f"digest of every bit: {bits}; {args.checkpoint}")
        verdict = "PASS" if passed else "FAIL"
        print(
            f"{verdict}: gradient of {args.processes} against one on the joint batch, fp64: {error:.0e} of the largest"
        )
    if dist.is_initialized():
        dist.barrier()  # a process that exits early would close the connections of the others
        dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
