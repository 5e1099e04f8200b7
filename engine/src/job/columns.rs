//! The columns of a Parquet output: a result's own, and those that the input's rows carry.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};
use serde_json::Value;

/// The columns of an output, found out row by row.
pub(super) struct Columns {
    /// Those of the input, where it says so.
    table: Option<SchemaRef>,
    fields: Vec<(String, Kind)>,
}

/// What all values of a column are; a null is any of them.
#[derive(Debug, Default, PartialEq)]
enum Kind {
    #[default]
    Null,
    Bool,
    Integer,
    Number,
    Text,
    List(Box<Self>),
    Object(Vec<(String, Self)>),
}

impl Columns {
    pub(super) fn new(table: Option<SchemaRef>) -> Self {
        Self { table, fields: Vec::new() }
    }

    /// # Errors
    /// A value is not of the type that the rows before have in that column; the text names it.
    pub(super) fn add(&mut self, column: &str, value: &Value) -> Result<(), String> {
        let kind = entry(&mut self.fields, column);
        match &self.table {
            Some(table) if table.field_with_name(column).is_ok() => Ok(()),
            _ => kind.add(column, value),
        }
    }

    /// `scores`: of rows that were scored.
    ///
    /// # Errors
    /// A column holds nothing but objects without keys.
    pub(super) fn schema(self, scores: bool) -> Result<SchemaRef, String> {
        let mut id = DataType::Int64;
        let mut carried = Vec::new();
        for (name, kind) in self.fields {
            let known = self.table.as_ref().and_then(|table| table.field_with_name(&name).ok());
            let data_type = match known {
                Some(field) => field.data_type().clone(),
                None => kind.data_type(&name)?,
            };
            match (name.as_str(), data_type) {
                ("id", data_type) => id = data_type,
                // Rows without an error so far may get one.
                ("error", DataType::Null) => {}
                (_, data_type) => carried.push(Field::new(name, data_type, true)),
            }
        }
        let id = Field::new("id", id, false);
        Ok(Arc::new(Schema::new(if scores { scored(id, carried) } else { generated(id, carried) })))
    }
}

fn generated(id: Field, carried: Vec<Field>) -> Vec<Field> {
    let (text, number) = (DataType::Utf8, DataType::Int32);
    let own = [("sample", &number), ("response", &text), ("finish_reason", &text), ("prompt_tokens", &number)];
    let more = [("completion_tokens", &number), ("seed", &DataType::Int64)];
    let own = own.into_iter().chain(more).map(|(name, data_type)| Field::new(name, data_type.clone(), false));
    std::iter::once(id).chain(own).chain([error()]).chain(carried).collect()
}

fn scored(id: Field, carried: Vec<Field>) -> Vec<Field> {
    let error = (!carried.iter().any(|field| field.name() == "error")).then(error);
    // By name, which is the model's to say.
    let entries = vec![Field::new("key", DataType::Utf8, false), Field::new("value", DataType::Float64, true)];
    let entries = Field::new("key_value", DataType::Struct(entries.into()), false);
    let rewards = Field::new("rewards", DataType::Map(Arc::new(entries), false), true);
    let score = Field::new("score", DataType::Float64, true);
    std::iter::once(id).chain(carried).chain(error).chain([rewards, score]).collect()
}

fn error() -> Field {
    let text = |name| Field::new(name, DataType::Utf8, true);
    Field::new("error", DataType::Struct(Fields::from(vec![text("code"), text("message")])), true)
}

fn entry<'a>(fields: &'a mut Vec<(String, Kind)>, name: &str) -> &'a mut Kind {
    let index = fields.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
        fields.push((name.to_owned(), Kind::Null));
        fields.len() - 1
    });
    &mut fields[index].1
}

impl Kind {
    fn of(value: &Value) -> Result<Self, &'static str> {
        Ok(match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Bool,
            Value::Number(number) if number.is_i64() => Self::Integer,
            Value::Number(number) if number.is_u64() => return Err("an integer beyond 2^63"),
            Value::Number(_) => Self::Number,
            Value::String(_) => Self::Text,
            Value::Array(_) => Self::List(Box::default()),
            Value::Object(_) => Self::Object(Vec::new()),
        })
    }

    fn words(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Integer | Self::Number => "a number",
            Self::Text => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    fn add(&mut self, path: &str, value: &Value) -> Result<(), String> {
        let kind = Self::of(value)
            .map_err(|what| format!("the column `{path}` holds {what}, which a column of a Parquet file cannot"))?;
        match (&*self, kind) {
            (_, Self::Null) | (Self::Number, Self::Integer) => return Ok(()),
            (Self::Null, kind) | (Self::Integer, kind @ Self::Number) => *self = kind,
            (known, kind) if std::mem::discriminant(known) != std::mem::discriminant(&kind) => {
                return Err(format!(
                    "the column `{path}` holds {} here and {} before; a column of a Parquet file has one type",
                    kind.words(),
                    known.words()
                ));
            }
            _ => {}
        }
        match (self, value) {
            (Self::List(inner), Value::Array(values)) => values.iter().try_for_each(|value| inner.add(path, value)),
            (Self::Object(fields), Value::Object(values)) => {
                values.iter().try_for_each(|(name, value)| entry(fields, name).add(&format!("{path}.{name}"), value))
            }
            _ => Ok(()),
        }
    }

    fn data_type(self, path: &str) -> Result<DataType, String> {
        Ok(match self {
            Self::Null => DataType::Null,
            Self::Bool => DataType::Boolean,
            Self::Integer => DataType::Int64,
            Self::Number => DataType::Float64,
            Self::Text => DataType::Utf8,
            Self::List(inner) => DataType::new_list(inner.data_type(path)?, true),
            Self::Object(fields) if fields.is_empty() => {
                return Err(format!("the column `{path}` holds objects without keys, which a Parquet file cannot"));
            }
            Self::Object(fields) => {
                let field = |(name, kind): (String, Self)| {
                    Ok(Field::new(&name, kind.data_type(&format!("{path}.{name}"))?, true))
                };
                DataType::Struct(fields.into_iter().map(field).collect::<Result<Vec<_>, String>>()?.into())
            }
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema(rows: &[Value], scores: bool) -> Result<SchemaRef, String> {
        let mut columns = Columns::new(None);
        for row in rows {
            row.as_object().unwrap().iter().try_for_each(|(column, value)| columns.add(column, value))?;
        }
        columns.schema(scores)
    }

    #[test]
    fn columns_are_those_of_all_rows() {
        let rows = [
            json!({"id": "a", "n": 1, "tags": [], "at": {"x": null}}),
            json!({"id": "b", "n": 0.5, "tags": ["t"], "at": {"x": true, "y": [1]}, "late": null}),
        ];
        let schema_of_rows = schema(&rows, false).unwrap();
        let types: Vec<(&str, DataType)> = schema_of_rows
            .fields()
            .iter()
            .filter(|field| !["response", "finish_reason", "error", "seed"].contains(&field.name().as_str()))
            .map(|field| (field.name().as_str(), field.data_type().clone()))
            .collect();
        let field = |name: &str, data_type| Field::new(name, data_type, true);
        let at = vec![field("x", DataType::Boolean), field("y", DataType::new_list(DataType::Int64, true))];
        let expected = [
            ("id", DataType::Utf8),
            ("sample", DataType::Int32),
            ("prompt_tokens", DataType::Int32),
            ("completion_tokens", DataType::Int32),
            ("n", DataType::Float64),
            ("tags", DataType::new_list(DataType::Utf8, true)),
            ("at", DataType::Struct(at.into())),
            ("late", DataType::Null),
        ];
        assert_eq!(types, expected);
    }

    #[test]
    fn columns_of_two_types_are_refused_by_name() {
        for (rows, expected) in [
            ([json!({"id": 1}), json!({"id": "b"})], "the column `id` holds a string here and a number before"),
            ([json!({"k": {"a": [1]}}), json!({"k": {"a": [[1]]}})], "the column `k.a` holds a list here and a number"),
            ([json!({"k": null}), json!({"k": u64::MAX})], "the column `k` holds an integer beyond 2^63"),
            ([json!({"k": {}}), json!({"k": {}})], "the column `k` holds objects without keys"),
        ] {
            let error = schema(&rows, false).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn scored_rows_keep_their_columns_and_can_get_an_error() {
        let names = |rows: &[Value]| -> Vec<String> {
            schema(rows, true).unwrap().fields().iter().map(|field| field.name().clone()).collect()
        };
        let expected = ["id", "response", "error", "rewards", "score"];
        assert_eq!(names(&[json!({"id": 1, "response": "a", "error": null})]), expected);
        assert_eq!(names(&[json!({"id": 1, "response": "a", "error": {"code": "x", "message": "y"}})]), expected);
    }
}
