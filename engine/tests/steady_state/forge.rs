//! Damage as somebody would do it who knows the formats: a field of a header gets a value that readers stumble over, and everything around it
//! stays well-formed.

use std::path::Path;

use serde_json::{Value, json};

use super::Random;

/// Lengths, counts and offsets at the edges of what integers hold, and beyond the end of any file.
const INTEGERS: [u64; 14] = [
    0,
    1,
    7,
    0xff,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 53,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// Sets one field of a file.
pub(super) fn forge(file: &Path, bytes: &mut Vec<u8>, random: &mut Random) {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    if let Ok(mut value) = serde_json::from_slice::<Value>(bytes) {
        json_node(&mut value, random);
        *bytes = value.to_string().into_bytes();
    } else if name.ends_with(".safetensors") && random.below(4) > 0 {
        safetensors(bytes, random);
    } else if name.ends_with(".yaml") {
        yaml(bytes, random);
    } else if name.ends_with(".nemo") && random.below(3) > 0 {
        tar(bytes, random);
    } else if name.ends_with(".model") && random.below(2) > 0 {
        varint(bytes, random);
    } else {
        integer(bytes, random);
    }
}

fn any_integer(bytes: &[u8], random: &mut Random) -> u64 {
    match random.below(INTEGERS.len() + 3) {
        i if i < INTEGERS.len() => INTEGERS[i],
        i => (bytes.len() + i - INTEGERS.len() - 1) as u64,
    }
}

/// An integer of four or eight bytes anywhere, mostly in the head: GGUF's counts, zip's directory, numbers in pickles.
fn integer(bytes: &mut [u8], random: &mut Random) {
    let width = [1, 2, 4, 8][random.below(4)];
    let value = any_integer(bytes, random).to_le_bytes();
    let end = match random.below(3) {
        0 => bytes.len(),
        1 => bytes.len().min(4096),
        _ => bytes.len().min(128),
    };
    let mut at = random.below(end.max(1));
    // Zip's directory stands at the end.
    if random.below(6) == 0 {
        at = bytes.len().saturating_sub(at + 1);
    }
    for (byte, value) in bytes.iter_mut().skip(at).zip(&value[..width]) {
        *byte = *value;
    }
}

/// A number of protobuf's, which may be a length, in place of one byte.
fn varint(bytes: &mut Vec<u8>, random: &mut Random) {
    let mut value = any_integer(bytes, random);
    let mut encoded = Vec::new();
    while value >= 0x80 {
        encoded.push(value as u8 | 0x80);
        value >>= 7;
    }
    encoded.push(value as u8);
    let at = random.below(bytes.len().max(1));
    bytes.splice(at..(at + 1).min(bytes.len()), encoded);
}

/// A value of the header, or the header's length.
fn safetensors(bytes: &mut Vec<u8>, random: &mut Random) {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else { return };
    let length = u64::from_le_bytes(*length) as usize;
    let Some(mut header) = rest.get(..length).and_then(|text| serde_json::from_slice::<Value>(text).ok()) else {
        return;
    };
    if random.below(8) == 0 {
        let length = any_integer(bytes, random);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        return;
    }
    json_node(&mut header, random);
    let header = header.to_string().into_bytes();
    let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
    bytes.splice(..8 + length, head);
}

/// The value of a line.
fn yaml(bytes: &mut Vec<u8>, random: &mut Random) {
    const VALUES: [&str; 14] = [
        "",
        "0",
        "1",
        "-1",
        "0.5",
        "1e400",
        ".nan",
        "18446744073709551615",
        "4294967296",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",
        "{a: &a [1, 1], b: &b [*a, *a], c: &c [*b, *b], d: [*c, *c]}",
        "*unknown",
        "!!python/object/apply:os.system [\"true\"]",
        "../../../../etc/passwd",
    ];
    let text = String::from_utf8_lossy(bytes).into_owned();
    let mut lines: Vec<String> = text.lines().map(String::from).collect();
    let line = random.below(lines.len().max(1));
    if let Some(line) = lines.get_mut(line) {
        let key = line.split_once(':').map_or(line.as_str(), |(key, _)| key);
        *line = format!("{key}: {}", VALUES[random.below(VALUES.len())]);
    }
    *bytes = lines.join("\n").into_bytes();
}

/// Size, kind or name of a member, with the checksum that belongs to it.
fn tar(bytes: &mut [u8], random: &mut Random) {
    let headers: Vec<usize> =
        (0..bytes.len() / 512).map(|block| block * 512).filter(|at| &bytes[at + 257..at + 262] == b"ustar").collect();
    let Some(&at) = headers.get(random.below(headers.len().max(1))) else { return };
    let header = &mut bytes[at..at + 512];
    match random.below(3) {
        0 => {
            let sizes: [&[u8; 12]; 6] = [
                b"00000000000\0",
                b"00000000001\0",
                b"77777777777\0",
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                b"-0000000001\0",
            ];
            header[124..136].copy_from_slice(sizes[random.below(sizes.len())]);
        }
        1 => header[156] = b"0123456789LKNSxgV\0"[random.below(18)],
        _ => {
            let names = ["../../outside", "/etc/passwd", "", ".", "model_config.yaml", "./model_weights/../../x"];
            header[..100].fill(0);
            let name = names[random.below(names.len())].as_bytes();
            header[..name.len()].copy_from_slice(name);
        }
    }
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A number, text, list or object somewhere.
fn json_node(value: &mut Value, random: &mut Random) {
    let mut node = random.below(count(value));
    if let Some(node) = nth(value, &mut node) {
        *node = forged(node, random);
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

fn nth<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, left)),
        Value::Object(fields) => fields.values_mut().find_map(|field| nth(field, left)),
        _ => None,
    }
}

fn forged(value: &Value, random: &mut Random) -> Value {
    let number = |random: &mut Random| match random.below(INTEGERS.len() + 4) {
        i if i < INTEGERS.len() => json!(INTEGERS[i]),
        0xe => json!(-1),
        0xf => json!(i64::MIN),
        0x10 => json!(0.5),
        _ => json!(1e300),
    };
    if random.below(6) == 0 {
        return [json!(null), json!([]), json!({}), json!("x"), json!(true), json!([[[[1]]]])][random.below(6)].clone();
    }
    match value {
        Value::Array(items) => {
            let mut items = items.clone();
            match random.below(5) {
                0 => items.clear(),
                1 => items.reverse(),
                2 => items.extend(items.clone()),
                3 => items = vec![number(random); 64],
                _ => drop(items.pop()),
            }
            items.into()
        }
        Value::Object(fields) => {
            let mut fields = fields.clone();
            let keys: Vec<String> = fields.keys().cloned().collect();
            if !keys.is_empty() {
                let (from, to) = (&keys[random.below(keys.len())], &keys[random.below(keys.len())]);
                let moved = fields.remove(from).unwrap_or_default();
                match random.below(2) {
                    0 => drop(fields.insert(to.clone(), moved)),
                    _ => drop(fields.insert(format!("../{to}"), moved)),
                }
            }
            fields.into()
        }
        Value::String(_) => {
            let texts = ["", "../../outside", "/etc/passwd", "BF16", "F64", "\u{0}", "torch_dist", "%n%s"];
            texts[random.below(texts.len())].into()
        }
        _ => number(random),
    }
}
