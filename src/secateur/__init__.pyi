# The public names, for type checkers and editors; the package itself imports them when they are first used.

from secateur.api.compare import Comparison as Comparison
from secateur.api.compare import compare as compare
from secateur.api.result import Result as Result
from secateur.api.run import run as run
from secateur.contract.ask import Ask as Ask
from secateur.contract.client import Client as Client
from secateur.contract.guard import Guard as Guard
from secateur.contract.method import Method as Method
from secateur.contract.reducer import Reduced as Reduced
from secateur.contract.reduction import Reduction as Reduction
from secateur.contract.state import Setting as Setting
from secateur.contract.state import State as State
from secateur.errors import SecateurError as SecateurError
from secateur.export.export import load as load
from secateur.methods.kit.composition import Composition as Composition
from secateur.study.runtime import Runtime as Runtime
from secateur.study.study import Study as Study
from secateur.wire.message import Message as Message

__version__: str
