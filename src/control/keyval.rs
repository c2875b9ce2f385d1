//! Options as `key=value,…` on a command line, by the rules of QEMU's tools.
//!
//! ```text
//! driver=qcow2,node-name=d0,file.driver=file,file.filename=/x,,y.qcow2
//! {"driver": "qcow2", "node-name": "d0", "file": {"driver": "file", "filename": "/x,y.qcow2"}}
//! ```
//!
//! Dots make nested objects, keys `0`, `1`, … arrays; a comma in a value is doubled; the first key
//! may be left out where the option has an implied one. What starts with a brace is JSON. All
//! values are texts, which become numbers and booleans where the type asks for them
//! ([`At::KEYVAL`](super::qapi::At::KEYVAL)).

use serde_json::{Map, Value};

use super::QmpError;
use super::qapi::{At, Object, QmpResult, object_from_value};

/// The longest fragment of a key, in bytes, as in QEMU.
const MAX_FRAGMENT: usize = 127;
/// The most fragments of a key.
const MAX_DEPTH: usize = 32;

/// Reads an option of this type. `implied` is the key that the first value may go without.
///
/// # Errors
/// In QEMU's words; names the parameter.
pub fn parse<T: Object>(text: &str, implied: Option<&str>) -> QmpResult<T> {
    if text.starts_with('{') {
        let value = serde_json::from_str(text)
            .map_err(|err| QmpError::generic(format!("JSON parse error: {err}")))?;
        return object_from_value(value, &At::ROOT);
    }
    object_from_value(to_value(text, implied)?, &At::KEYVAL)
}

/// The nested object that a text stands for; all leaves are strings.
pub fn to_value(text: &str, implied: Option<&str>) -> QmpResult<Value> {
    let mut root = Map::new();
    let mut rest = text;
    let mut is_first = true;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, value_at) = match (rest[end..].starts_with('='), implied) {
            (true, _) => (&rest[..end], end + 1),
            (false, Some(implied)) if is_first && end > 0 => (implied, 0),
            _ if end == 0 => return Err(invalid(rest)),
            _ => {
                return Err(QmpError::generic(format!(
                    "Expected '=' after parameter '{}'",
                    &rest[..end]
                )));
            }
        };
        let (value, after) = take_value(&rest[value_at..]);
        put(&mut root, key, value)?;
        rest = after;
        is_first = false;
    }
    listify(Value::Object(root), "")
}

fn invalid(key: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter '{key}'"))
}

/// The value at the start, with doubled commas made single, and what follows its comma.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

fn put(root: &mut Map<String, Value>, key: &str, value: String) -> QmpResult<()> {
    let fragments: Vec<_> = key.split('.').collect();
    let is_good = |fragment: &&str| {
        let is_index = fragment.bytes().all(|b| b.is_ascii_digit());
        let is_name = fragment.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && fragment.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        !fragment.is_empty() && fragment.len() <= MAX_FRAGMENT && (is_index || is_name)
    };
    if !fragments.iter().all(is_good)
        || fragments.len() > MAX_DEPTH
        || fragments[0].starts_with(|c: char| c.is_ascii_digit())
    {
        return Err(invalid(key));
    }
    let (last, path) = fragments.split_last().expect("split gives at least one");
    let mut object = root;
    for (depth, fragment) in path.iter().enumerate() {
        let inner = object.entry(*fragment).or_insert_with(|| Value::Object(Map::new()));
        object = inner.as_object_mut().ok_or_else(|| {
            QmpError::generic(format!(
                "Parameters '{}.*' used inconsistently",
                fragments[..=depth].join(".")
            ))
        })?;
    }
    // The last one wins, as in QEMU.
    if object.insert(last.to_string(), Value::String(value)).is_some_and(|old| old.is_object()) {
        return Err(QmpError::generic(format!("Parameters '{key}.*' used inconsistently")));
    }
    Ok(())
}

/// Makes arrays of the objects whose keys are numbers.
fn listify(value: Value, at: &str) -> QmpResult<Value> {
    let Value::Object(object) = value else { return Ok(value) };
    let path = |key: &str| if at.is_empty() { key.to_string() } else { format!("{at}.{key}") };
    let numbers = object.keys().filter(|key| key.starts_with(|c: char| c.is_ascii_digit())).count();
    if numbers == 0 {
        let each = object.into_iter().map(|(key, value)| {
            let value = listify(value, &path(&key))?;
            Ok((key, value))
        });
        return each.collect::<QmpResult<Map<_, _>>>().map(Value::Object);
    }
    if numbers < object.len() {
        return Err(QmpError::generic(format!("Parameters '{at}.*' used inconsistently")));
    }
    let mut elements = Vec::with_capacity(numbers);
    let mut object = object;
    for index in 0..numbers {
        let key = index.to_string();
        let Some(element) = object.remove(&key) else {
            return Err(QmpError::generic(format!("Parameter '{}' missing", path(&key))));
        };
        elements.push(listify(element, &path(&key))?);
    }
    Ok(Value::Array(elements))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn value(text: &str) -> Value {
        to_value(text, Some("driver")).unwrap()
    }

    fn error(text: &str) -> String {
        to_value(text, Some("driver")).unwrap_err().desc
    }

    #[test]
    fn dots_nest_and_commas_double() {
        assert_eq!(
            value("qcow2,node-name=d0,file.driver=file,file.filename=/x,,y=1,cache.direct=on,"),
            json!({
                "driver": "qcow2", "node-name": "d0",
                "file": {"driver": "file", "filename": "/x,y=1"},
                "cache": {"direct": "on"},
            })
        );
        assert_eq!(value("driver=a,driver=b"), json!({"driver": "b"}));
        assert_eq!(value(""), json!({}));
        assert_eq!(value("a.1=y,a.0.b=x"), json!({"a": [{"b": "x"}, "y"]}));
        assert_eq!(value("x=,,,y=1"), json!({"x": ",", "y": "1"}));
    }

    #[test]
    fn misuse_is_told_as_qemu_does() {
        assert_eq!(error("a=1,b"), "Expected '=' after parameter 'b'");
        assert_eq!(error("a=1,a.b=2"), "Parameters 'a.*' used inconsistently");
        assert_eq!(error("a.b=2,a=1"), "Parameters 'a.*' used inconsistently");
        assert_eq!(error("a.0=1,a.x=2"), "Parameters 'a.*' used inconsistently");
        assert_eq!(error("a.0=1,a.2=2"), "Parameter 'a.1' missing");
        assert_eq!(error("a..b=1"), "Invalid parameter 'a..b'");
        assert_eq!(error("0=1"), "Invalid parameter '0'");
        assert_eq!(error("=1"), "Invalid parameter ''");
        assert!(error(&format!("{}=1", "x".repeat(128))).starts_with("Invalid parameter"));
        assert!(error(&format!("a{}=1", ".a".repeat(40))).starts_with("Invalid parameter"));
    }
}
