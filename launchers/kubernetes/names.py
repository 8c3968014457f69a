"""What the modules that render and those that ask must agree on."""

from typing import Any

Tree = dict[str, Any]

CONTAINER = "node"  # the torch policy of TrainJobs looks for a container of this name
APPLICATION = "app.kubernetes.io"  # labels
API_VERSIONS = {
    "ConfigMap": "v1",
    "Job": "batch/v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "RayJob": "ray.io/v1",
}
