"""The processes of a run: who they are, and how they agree."""

from factorlm.distributed.world import World, peers_watched

__all__ = ["World", "peers_watched"]
