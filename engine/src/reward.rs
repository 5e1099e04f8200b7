//! What a reward model says of a conversation: a value an attribute, and one number made of them.

use std::borrow::Cow;

use serde_json::Value;

use crate::request::{LogprobSpec, Request, Sampling, Stopping};

/// Values of Nemotron-4-340B-Reward in their order; the first four were not trained for.
const ATTRIBUTES: [&str; 9] = [
    "quality",
    "toxicity",
    "humor",
    "creativity",
    "helpfulness",
    "correctness",
    "coherence",
    "complexity",
    "verbosity",
];

/// The model card's weights, by which the values become one.
const WEIGHTS: [f32; 9] = [0.0, 0.0, 0.0, 0.0, 0.3, 0.74, 0.46, 0.47, -0.33];

/// The name of an attribute; of models that have others, its number.
pub(crate) fn attribute(index: usize) -> Cow<'static, str> {
    match ATTRIBUTES.get(index) {
        Some(name) => (*name).into(),
        None => format!("attribute_{index}").into(),
    }
}

/// One number for all attributes, where they are those that the weights are for.
pub(crate) fn scalar(values: &[f32]) -> Option<f32> {
    (values.len() == WEIGHTS.len()).then(|| values.iter().zip(WEIGHTS).map(|(value, weight)| value * weight).sum())
}

/// Attributes that the model was trained for, with their values.
pub(crate) fn trained(values: &[f32]) -> impl Iterator<Item = (Cow<'static, str>, f32)> {
    let untrained = if values.len() == WEIGHTS.len() { 4 } else { 0 };
    values.iter().enumerate().skip(untrained).map(|(index, value)| (attribute(index), *value))
}

/// `{"quality": 0.1, …}`.
pub(crate) fn by_name(values: &[f32]) -> Value {
    let named = values.iter().enumerate().map(|(index, value)| (attribute(index).into_owned(), number(*value)));
    Value::Object(named.collect())
}

/// A number with no more digits than its precision has.
pub fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// Asks for the values of a text.
pub(crate) fn request(prompt: Vec<u32>) -> Request {
    Request {
        prompt,
        sampling: Sampling::default(),
        stopping: Stopping { max_new_tokens: 1, ..Stopping::default() },
        logprobs: LogprobSpec { rewards: true, ..LogprobSpec::default() },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nine_values_have_names_and_one_sum() {
        assert_eq!((attribute(4), attribute(9)), ("helpfulness".into(), "attribute_9".into()));
        assert_eq!(scalar(&[1.0; 9]), Some(WEIGHTS.iter().sum()));
        assert_eq!(scalar(&[1.0; 2]), None);
        assert_eq!(trained(&[1.0; 9]).map(|(name, _)| name).collect::<Vec<_>>(), ATTRIBUTES[4..]);
        assert_eq!(by_name(&[0.1, 2.0]), json!({"quality": 0.1, "toxicity": 2.0}));
    }
}
