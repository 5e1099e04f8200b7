//! The header of a safetensors file: eight bytes of length, then JSON that gives each tensor's type, shape and place in the rest.
//!
//! Files are untrusted: the header may not claim more than there is, places must follow one another without gap or overlap up to the
//! end of the file, and no name may appear twice.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::{CheckpointError, Dtype, StoredDtype};

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// As the file spells it.
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(super) bytes: Range<usize>,
}

impl Entry {
    /// `None` for an element type that the engine does not read.
    pub(super) fn dtype(&self) -> Option<StoredDtype> {
        match self.dtype.as_str() {
            "BF16" => Some(StoredDtype::Plain(Dtype::Bf16)),
            "F16" => Some(StoredDtype::Plain(Dtype::F16)),
            "F32" => Some(StoredDtype::Plain(Dtype::F32)),
            "F8_E4M3" => Some(StoredDtype::F8E4M3),
            _ => None,
        }
    }
}

/// The tensors of a file in the order of their bytes.
pub(super) fn read_header(file: &Path, bytes: &[u8]) -> Result<Vec<Entry>, CheckpointError> {
    const LENGTH_BYTES: usize = 8;
    let damaged = |problem: String| CheckpointError::damaged(file, problem);
    let (length, rest) =
        bytes.split_first_chunk::<LENGTH_BYTES>().ok_or_else(|| damaged("it is shorter than a header".to_owned()))?;
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or_else(|| {
        damaged(format!("it claims a header of {length} bytes and has {} more bytes in all", rest.len()))
    })?;
    let Header(mut entries) =
        serde_json::from_slice(header).map_err(|error| damaged(format!("its header cannot be read: {error}")))?;

    let data_start = LENGTH_BYTES + header.len();
    let data_bytes = bytes.len() - data_start;
    entries.sort_by_key(|entry| (entry.bytes.start, entry.bytes.end));
    let mut expected_start = 0;
    for entry in &mut entries {
        let Range { start, end } = entry.bytes;
        if end < start || end > data_bytes {
            let problem = format!("tensor {} lies at bytes {start}..{end} of {data_bytes}", entry.name);
            return Err(damaged(problem));
        }
        if start != expected_start {
            let kind = if start < expected_start { "overlaps" } else { "leaves a gap after" };
            return Err(damaged(format!("tensor {} {kind} the tensor before it", entry.name)));
        }
        expected_start = end;
        if let Some(dtype) = entry.dtype() {
            let elements = entry.shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
            if elements.and_then(|elements| elements.checked_mul(dtype.size())) != Some(end - start) {
                let problem = format!(
                    "tensor {} of type {} and shape {:?} does not fill its {} bytes",
                    entry.name,
                    entry.dtype,
                    entry.shape,
                    end - start
                );
                return Err(damaged(problem));
            }
        }
        entry.bytes = data_start + start..data_start + end;
    }
    if expected_start != data_bytes {
        return Err(damaged(format!("{} bytes belong to no tensor", data_bytes - expected_start)));
    }
    Ok(entries)
}

/// Entries with places that count from the end of the header.
struct Header(Vec<Entry>);

#[derive(serde::Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;

        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object with one key for each tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut names = HashSet::new();
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(Error::custom(format_args!("{name} appears twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let Info { dtype, shape, data_offsets: (start, end) } = map.next_value()?;
                    entries.push(Entry { name, dtype, shape, bytes: start..end });
                }
                Ok(Header(entries))
            }
        }

        deserializer.deserialize_map(Tensors)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;

    fn file(header: &str, data_bytes: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data_bytes]].concat()
    }

    fn read(bytes: &[u8]) -> Result<Vec<Entry>, String> {
        read_header(Path::new("w"), bytes).map_err(|error| error.to_string())
    }

    const TWO: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}"#;

    #[test]
    fn tensors_are_found_where_another_reader_finds_them() {
        let bytes = include_bytes!("../../assets/nemotron-shakespeare/model.safetensors");
        let other = SafeTensors::deserialize(bytes).unwrap();
        let entries = read(bytes).unwrap();
        assert_eq!(entries.len(), other.len());
        for entry in entries {
            let tensor = other.tensor(&entry.name).unwrap();
            assert_eq!((&bytes[entry.bytes.clone()], entry.shape.as_slice()), (tensor.data(), tensor.shape()));
            assert_eq!(
                (entry.dtype(), tensor.dtype()),
                (Some(StoredDtype::Plain(Dtype::Bf16)), safetensors::Dtype::BF16)
            );
        }
    }

    #[test]
    fn unread_types_are_kept_and_order_is_that_of_the_bytes() {
        let entries = read(&file(TWO, 16)).unwrap();
        let names: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.dtype())).collect();
        assert_eq!(names, [("a", Some(StoredDtype::Plain(Dtype::Bf16))), ("b", None)]);
    }

    #[test]
    fn hostile_headers_are_refused_by_name() {
        let check = |bytes: &[u8], expected: &str| {
            assert_eq!(read(bytes).unwrap_err(), format!("w is damaged: {expected}"));
        };
        check(b"1234567", "it is shorter than a header");
        check(&[0xff; 12], "it claims a header of 18446744073709551615 bytes and has 4 more bytes in all");
        check(&file(TWO, 15), "tensor b lies at bytes 8..16 of 15");
        check(&file(TWO, 17), "1 bytes belong to no tensor");
        check(&file("{}", 1), "1 bytes belong to no tensor");
        let one = |shape: &str, start: u64, end: u64| {
            file(&format!(r#"{{"a":{{"dtype":"BF16","shape":{shape},"data_offsets":[{start},{end}]}}}}"#), 8)
        };
        check(&one("[4]", 8, 0), "tensor a lies at bytes 8..0 of 8");
        check(&one("[4]", 0, u64::MAX), "tensor a lies at bytes 0..18446744073709551615 of 8");
        check(&one("[2]", 4, 8), "tensor a leaves a gap after the tensor before it");
        check(&one("[5]", 0, 8), "tensor a of type BF16 and shape [5] does not fill its 8 bytes");
        let huge = "[4294967296,4294967296,4]";
        let problem = "shape [4294967296, 4294967296, 4] does not fill its 8 bytes";
        check(&one(huge, 0, 8), &format!("tensor a of type BF16 and {problem}"));
        check(&file(&TWO.replace("[8,16]", "[4,16]"), 16), "tensor b overlaps the tensor before it");
        let twice = read(&file(&TWO.replace(r#""b""#, r#""a""#), 16)).unwrap_err();
        assert!(twice.starts_with("w is damaged: its header cannot be read: a appears twice"), "{twice}");
        for header in ["", "[]", "{", r#"{"a":1}"#, r#"{"a":{}}"#, "\u{1}"] {
            assert!(read(&file(header, 0)).unwrap_err().contains("its header cannot be read"), "{header}");
        }
        let negative = TWO.replace("[2,2]", "[-2,-2]");
        assert!(read(&file(&negative, 16)).is_err());
    }

    proptest! {
        #[test]
        fn no_change_of_a_file_makes_the_reader_panic_or_point_outside(
            at in 0..TWO.len() + 24,
            byte: u8,
            length in 0..TWO.len() + 25,
        ) {
            let mut bytes = file(TWO, 16);
            bytes[at] = byte;
            bytes.truncate(length.max(1));
            for entry in read(&bytes).unwrap_or_default() {
                prop_assert!(bytes.get(entry.bytes).is_some());
            }
        }
    }
}
