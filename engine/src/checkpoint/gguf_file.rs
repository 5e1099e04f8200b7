//! The header of a GGUF file (versions 2 and 3, little-endian): metadata by key, and where tensors lie.
//! Source: the GGUF specification of the ggml project.

use std::ops::Range;

use serde_json::{Map, Number, Value};

const MAGIC: &[u8] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
/// More than any file has.
const MAX_AXES: u32 = 4;

/// Types of metadata values.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

pub(super) struct GgufHeader {
    /// Metadata that is no array.
    pub(super) scalars: Map<String, Value>,
    arrays: Map<String, Value>,
    array_places: Vec<ArrayPlace>,
    pub(super) tensors: Vec<TensorInfo>,
}

/// An array of the metadata, left in the file.
struct ArrayPlace {
    kind: u32,
    len: u64,
    bytes: Range<usize>,
}

pub(super) struct TensorInfo {
    pub(super) name: String,
    /// In the order of the file: columns before rows.
    pub(super) axes: Vec<usize>,
    /// `ggml_type`
    pub(super) kind: u32,
    /// Bytes from the beginning of the file to the first element.
    pub(super) offset: usize,
}

impl GgufHeader {
    pub(super) fn read(file: &[u8]) -> Result<Self, String> {
        let mut cursor = Cursor { file, at: 0 };
        if cursor.take(4)? != MAGIC {
            return Err("it does not begin with GGUF".to_owned());
        }
        let version = cursor.u32()?;
        if !matches!(version, 2 | 3) {
            return Err(format!("it is GGUF version {version}, not 2 or 3 in little-endian order"));
        }
        let (num_tensors, num_keys) = (cursor.u64()?, cursor.u64()?);
        let mut header =
            Self { scalars: Map::new(), arrays: Map::new(), array_places: Vec::new(), tensors: Vec::new() };
        for _ in 0..num_keys {
            let key = cursor.string()?.to_owned();
            let kind = cursor.u32()?;
            let twice = if kind == ARRAY {
                let (kind, len) = (cursor.u32()?, cursor.u64()?);
                let start = cursor.at;
                cursor.skip_array(kind, len)?;
                let place = header.array_places.len();
                header.array_places.push(ArrayPlace { kind, len, bytes: start..cursor.at });
                header.arrays.insert(key.clone(), place.into())
            } else {
                header.scalars.insert(key.clone(), cursor.scalar(kind)?)
            };
            if twice.is_some() {
                return Err(format!("key {key} appears twice"));
            }
        }
        for _ in 0..num_tensors {
            let name = cursor.string()?.to_owned();
            let num_axes = cursor.u32()?;
            if num_axes > MAX_AXES {
                return Err(format!("tensor {name} has {num_axes} axes"));
            }
            let axes = (0..num_axes).map(|_| cursor.size()).collect::<Result<_, _>>()?;
            let (kind, offset) = (cursor.u32()?, cursor.size()?);
            header.tensors.push(TensorInfo { name, axes, kind, offset });
        }
        let alignment = match header.scalars.get(ALIGNMENT_KEY) {
            None => DEFAULT_ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(bytes @ 1..=0x10_0000) => bytes as usize,
                _ => return Err(format!("{ALIGNMENT_KEY} is {value}")),
            },
        };
        let data = cursor.at.next_multiple_of(alignment);
        for tensor in &mut header.tensors {
            let offset = tensor.offset.checked_add(data).filter(|offset| *offset <= file.len());
            tensor.offset = offset.ok_or_else(|| format!("tensor {} lies beyond the end", tensor.name))?;
        }
        Ok(header)
    }

    /// The strings of an array; `None` if it is not there or of another type.
    pub(super) fn strings<'a>(&self, file: &'a [u8], key: &str) -> Option<Vec<&'a str>> {
        let place = self.array(key).filter(|place| place.kind == STRING)?;
        let mut cursor = Cursor { file: &file[..place.bytes.end], at: place.bytes.start };
        (0..place.len).map(|_| cursor.string().ok()).collect()
    }

    /// The numbers of an array.
    pub(super) fn numbers(&self, file: &[u8], key: &str) -> Option<Vec<f64>> {
        let place = self.array(key).filter(|place| place.kind != STRING)?;
        let mut cursor = Cursor { file: &file[..place.bytes.end], at: place.bytes.start };
        (0..place.len).map(|_| cursor.scalar(place.kind).ok()?.as_f64()).collect()
    }

    fn array(&self, key: &str) -> Option<&ArrayPlace> {
        let place = self.arrays.get(key)?.as_u64()?;
        self.array_places.get(usize::try_from(place).ok()?)
    }
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.file.len());
        let end = end.ok_or("its header is cut")?;
        let taken = &self.file[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn size(&mut self) -> Result<usize, String> {
        usize::try_from(self.u64()?).map_err(|_| "its header is cut".to_owned())
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let len = self.size()?;
        std::str::from_utf8(self.take(len)?).map_err(|_| "its header has a text that is not UTF-8".to_owned())
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => self.array::<1>()?[0].into(),
            1 => i8::from_le_bytes(self.array()?).into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            5 => i32::from_le_bytes(self.array()?).into(),
            // NaN and infinities become null, which counts as absent.
            6 => Number::from_f64(f32::from_le_bytes(self.array()?).into()).map_or(Value::Null, Value::Number),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            STRING => self.string()?.into(),
            10 => self.u64()?.into(),
            11 => i64::from_le_bytes(self.array()?).into(),
            12 => Number::from_f64(f64::from_le_bytes(self.array()?)).map_or(Value::Null, Value::Number),
            _ => return Err(format!("its metadata has a value of type {kind}")),
        })
    }

    fn skip_array(&mut self, kind: u32, len: u64) -> Result<(), String> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            STRING => {
                for _ in 0..len {
                    self.string()?;
                }
                return Ok(());
            }
            _ => return Err(format!("its metadata has an array of type {kind}")),
        };
        let bytes = usize::try_from(len).ok().and_then(|len| len.checked_mul(size)).ok_or("its header is cut")?;
        self.take(bytes)?;
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn hostile_headers_are_refused() {
        let start = |tensors: u64, keys: u64| {
            [MAGIC, &3_u32.to_le_bytes(), &tensors.to_le_bytes(), &keys.to_le_bytes()].concat()
        };
        let error = |bytes: &[u8]| GgufHeader::read(bytes).err().unwrap();
        assert_eq!(error(b"GGML...."), "it does not begin with GGUF");
        assert_eq!(error(b"GGUF\0\0\0\x03"), "it is GGUF version 50331648, not 2 or 3 in little-endian order");
        assert_eq!(error(&start(u64::MAX, 0)), "its header is cut");
        assert_eq!(error(&start(0, u64::MAX)), "its header is cut");
        let key = |rest: &[u8]| [&start(0, 1)[..], &1_u64.to_le_bytes(), b"k", rest].concat();
        assert_eq!(error(&key(&[99, 0, 0, 0])), "its metadata has a value of type 99");
        let array =
            |kind: u32, len: u64| key(&[&ARRAY.to_le_bytes()[..], &kind.to_le_bytes(), &len.to_le_bytes()].concat());
        assert_eq!(error(&array(10, u64::MAX)), "its header is cut");
        assert_eq!(error(&array(STRING, u64::MAX)), "its header is cut");
        assert_eq!(error(&array(ARRAY, 1)), "its metadata has an array of type 9");
        assert!(GgufHeader::read(&array(4, 0)).is_ok());
    }
}
