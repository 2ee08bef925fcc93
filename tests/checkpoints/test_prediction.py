"""What a model predicts is read from every place that states it, and written back."""

import pytest

from koala.checkpoints.pipeline_files import BETAS
from koala.checkpoints.prediction import EPSILON, VELOCITY, Prediction, of_config, of_file
from koala.errors import UserError

CONFIG = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, **BETAS}
EVERY = [Prediction(type, zero) for type in (EPSILON, VELOCITY) for zero in (False, True)]


@pytest.mark.parametrize("prediction", EVERY, ids=str)
def test_it_comes_back_from_what_is_written(prediction):
    assert of_config({**CONFIG, **prediction.config}) == prediction
    assert of_file(prediction.marks, prediction.metadata) == prediction


@pytest.mark.parametrize(
    ("names", "metadata", "expected"),
    [
        ((), {}, None),
        (("v_pred",), {}, Prediction(VELOCITY)),
        (("v_pred", "ztsnr"), {}, Prediction(VELOCITY, True)),
        ((), {"modelspec.prediction_type": "v"}, Prediction(VELOCITY)),
        ((), {"modelspec.prediction_type": "epsilon"}, Prediction(EPSILON)),
        ((), {"ss_v_parameterization": "True"}, Prediction(VELOCITY)),
        ((), {"ss_v_parameterization": "False"}, Prediction(EPSILON)),
        (
            (),
            {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
            Prediction(VELOCITY, True),
        ),
        # A merge keeps the metadata of one of its models: the tensors are newer.
        (("v_pred",), {"modelspec.prediction_type": "epsilon"}, Prediction(VELOCITY)),
    ],
)
def test_a_file_says_it_by_tensors_or_metadata(names, metadata, expected):
    assert of_file(names, metadata) == expected


@pytest.mark.parametrize(
    "choice",
    [
        {"use_karras_sigmas": True, "_class_name": "DPMSolverMultistepScheduler"},
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"use_beta_sigmas": True},
        {"_class_name": "LCMScheduler", "original_inference_steps": 50},
    ],
)
def test_how_steps_are_spaced_is_no_property_of_a_model(choice):
    assert of_config({**CONFIG, **choice}) == Prediction()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "an EDM model"),
        ({"sigma_data": 0.5}, "an EDM model"),
        ({"timestep_type": "continuous"}, "an EDM model"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a flow-matching model"),
        ({"prediction_type": "flow_prediction"}, "a flow-matching model"),
        ({"use_flow_sigmas": True}, "a flow-matching model"),
        ({"prediction_type": "sample"}, "predicts 'sample'"),
        ({"beta_start": None, "beta_schedule": None}, "lacks beta_start, beta_schedule"),
        ({"beta_schedule": "linear"}, "beta_schedule = 'linear'"),
        ({"trained_betas": [0.1]}, "trained_betas = "),
    ],
)
def test_another_kind_of_schedule_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        of_config({**CONFIG, **change})


@pytest.mark.parametrize(
    ("names", "metadata", "message"),
    [
        (("edm_mean", "edm_std"), {}, "an EDM model"),
        (("edm_vpred.sigma_max", "edm_vpred.sigma_min"), {}, "an EDM model"),
        ((), {"modelspec.prediction_type": "rectified_flow"}, "a flow-matching model"),
        ((), {"modelspec.prediction_type": "x0"}, "predicts 'x0'"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(names, metadata, message):
    with pytest.raises(UserError, match=message):
        of_file(names, metadata)
