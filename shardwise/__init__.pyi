from shardwise.data.datasets import arrays as arrays
from shardwise.data.datasets import dataset as dataset
from shardwise.data.datasets import synthetic as synthetic
from shardwise.data.corpus import files as files
from shardwise.data.corpus import python_stdlib as python_stdlib
from shardwise.data.text import text as text
from shardwise.models.losses import accuracy as accuracy
from shardwise.models.losses import cross_entropy as cross_entropy
from shardwise.models.losses import mse as mse
from shardwise.models.losses import next_token_loss as next_token_loss
from shardwise.spec.cluster import Cluster as Cluster
from shardwise.spec.job import EarlyStop as EarlyStop
from shardwise.spec.job import Optimizer as Optimizer
from shardwise.spec.job import TrainJob as TrainJob
from shardwise.spec.plan import Plan as Plan
from shardwise.train.api import evaluate as evaluate
from shardwise.train.api import export as export
from shardwise.train.api import plan as plan
from shardwise.train.api import sample as sample
from shardwise.train.api import show as show
from shardwise.train.api import train as train
from shardwise.train.optimizers import adamw as adamw
from shardwise.train.optimizers import optimizer as optimizer
from shardwise.train.optimizers import sgd as sgd
from shardwise.train.session import session as session

__version__: str
