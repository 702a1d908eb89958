"""An attack of one's own: attackers who see all replies, and send their honest ones after all."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.contract.attack import Attack


@dataclass(frozen=True)
class Watching(Attack):
    """Colludes, and changes nothing; ``SEEN`` notes who saw how many replies."""

    SEEN: ClassVar[list] = []
    colludes: ClassVar[bool] = True

    def craft(self, message, cohort, scene):
        self.SEEN.append((scene.phase, scene.round, scene.client, len(cohort.honest), len(cohort.own)))
        return message
