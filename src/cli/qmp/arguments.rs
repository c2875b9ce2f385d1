//! From the words of a command line to the arguments of a command.
//!
//! `key=value` says nothing about types: is `1` a number or a name? The other side's schema knows,
//! and so nothing has to be guessed but for what the schema leaves open.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::connection::Connection;
use crate::cli::size;
use crate::control::keyval;
use crate::error::{Error, Result};

/// What the other side takes: its `query-qmp-schema`, by name.
#[derive(Debug, Default)]
pub struct Schema {
    commands: BTreeMap<String, Value>,
    types: BTreeMap<String, Value>,
}

/// Nesting of types beyond which nothing is converted.
const MAX_DEPTH: usize = 32;

impl Schema {
    /// Asks the other side.
    pub fn fetch(connection: &mut Connection) -> Result<Schema> {
        Ok(Schema::new(connection.execute("query-qmp-schema", Value::Null)?))
    }

    fn new(entries: Value) -> Schema {
        let mut schema = Schema::default();
        let Value::Array(entries) = entries else { return schema };
        for entry in entries {
            let Some(name) = entry["name"].as_str().map(String::from) else { continue };
            match entry["meta-type"].as_str() {
                Some("command") => schema.commands.insert(name, entry),
                Some("event") | None => None,
                Some(_) => schema.types.insert(name, entry),
            };
        }
        schema
    }

    /// One line for each command: its name and what it takes.
    pub fn usages(&self) -> Vec<String> {
        self.commands.keys().filter_map(|name| self.usage(name)).collect()
    }

    /// The same for one command, if there is such a one.
    pub fn usage(&self, name: &str) -> Option<String> {
        let command = self.commands.get(name)?;
        let mut text = name.to_string();
        let ty = self.types.get(command["arg-type"].as_str().unwrap_or_default());
        for member in ty.and_then(|ty| ty["members"].as_array()).into_iter().flatten() {
            let name = member["name"].as_str().unwrap_or_default();
            text += &match member.get("default") {
                Some(_) => format!(" [{name}=…]"),
                None => format!(" {name}=…"),
            };
        }
        Some(text)
    }

    fn ty(&self, name: &Value) -> Option<&Value> {
        self.types.get(name.as_str()?)
    }

    /// The type of a member of an object, whose other members say which variant it is.
    fn member<'a>(&'a self, ty: &'a Value, name: &str, tag: Option<&str>) -> Option<&'a Value> {
        let of = |ty: &'a Value| {
            ty["members"].as_array()?.iter().find(|m| m["name"] == name).map(|m| &m["type"])
        };
        of(ty).or_else(|| {
            let tag = tag?;
            let variant = ty["variants"].as_array()?.iter().find(|v| v["case"] == tag)?;
            self.member(self.ty(&variant["type"])?, name, Some(tag))
        })
    }

    /// Gives a value made of strings the types that are expected of it. What does not fit is left
    /// as it is: the other side has the better words for that.
    fn convert(&self, value: Value, ty: Option<&Value>, depth: usize) -> Value {
        let Some(ty) = ty.filter(|_| depth < MAX_DEPTH) else { return guess_all(value) };
        let next = depth + 1;
        match (ty["meta-type"].as_str().unwrap_or_default(), value) {
            ("builtin", Value::String(text)) => builtin(&ty["json-type"], text),
            ("object", Value::Object(object)) => {
                let tag = ty["tag"].as_str().and_then(|tag| object.get(tag)?.as_str());
                let tag = tag.map(String::from);
                let convert = |(name, value): (String, Value)| {
                    let ty = self.member(ty, &name, tag.as_deref()).and_then(|ty| self.ty(ty));
                    let value = self.convert(value, ty, next);
                    (name, value)
                };
                Value::Object(object.into_iter().map(convert).collect())
            }
            ("array", Value::Array(values)) => {
                let element = self.ty(&ty["element-type"]);
                let convert = |value| self.convert(value, element, next);
                Value::Array(values.into_iter().map(convert).collect())
            }
            ("object" | "array" | "alternate", Value::String(text))
                if text.starts_with(['{', '[']) =>
            {
                serde_json::from_str(&text).unwrap_or(Value::String(text))
            }
            ("array", Value::String(text)) => {
                let element = self.ty(&ty["element-type"]);
                let one = |text: &str| self.convert(Value::String(text.into()), element, next);
                Value::Array(text.split(',').map(one).collect())
            }
            ("alternate", value) => {
                let wanted = if value.is_object() { "object" } else { "array" };
                let mut types =
                    ty["members"].as_array().into_iter().flatten().map(|m| self.ty(&m["type"]));
                match types.find(|ty| ty.is_some_and(|ty| ty["meta-type"] == wanted)) {
                    Some(ty) if !value.is_string() => self.convert(value, ty, next),
                    _ => value,
                }
            }
            (_, value) => value,
        }
    }
}

/// A text as the builtin type that is expected.
fn builtin(json_type: &Value, text: String) -> Value {
    match json_type.as_str().unwrap_or_default() {
        "int" => match text.parse::<i64>() {
            Ok(number) => number.into(),
            Err(_) => size::parse_size(&text).map_or(Value::String(text), Value::from),
        },
        "number" => match text.parse::<f64>() {
            Ok(number) => number.into(),
            Err(_) => Value::String(text),
        },
        "boolean" => match text.as_str() {
            "on" | "true" | "yes" => true.into(),
            "off" | "false" | "no" => false.into(),
            _ => Value::String(text),
        },
        "null" if text == "null" => Value::Null,
        "value" => guess(text),
        _ => Value::String(text),
    }
}

/// A text as the JSON that it looks like, or as itself.
fn guess(text: String) -> Value {
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

fn guess_all(value: Value) -> Value {
    match value {
        Value::String(text) => guess(text),
        Value::Array(values) => values.into_iter().map(guess_all).collect(),
        Value::Object(object) => Value::Object(
            object.into_iter().map(|(name, value)| (name, guess_all(value))).collect(),
        ),
        other => other,
    }
}

/// The arguments that words stand for.
///
/// # Errors
/// A word that is neither `key=value` nor a JSON object.
pub fn parse(words: &[String], command: &str, schema: &Schema) -> Result<Map<String, Value>> {
    let mut arguments = Map::new();
    let mut pairs = Vec::new();
    for word in words {
        if word.starts_with('{') {
            let object: Map<String, Value> = serde_json::from_str(word)
                .map_err(|err| Error::invalid(format!("argument {word}: not JSON: {err}")))?;
            arguments.extend(object);
        } else if word.contains('=') {
            // Each word is one pair, whatever commas it has.
            pairs.push(word.replace(',', ",,"));
        } else {
            return Err(Error::invalid(format!("argument {word}: key=value is expected")));
        }
    }
    let pairs = keyval::to_value(&pairs.join(","), None).map_err(|err| Error::invalid(err.desc))?;
    let ty = schema.commands.get(command).and_then(|command| schema.ty(&command["arg-type"]));
    if let Value::Object(pairs) = schema.convert(pairs, ty, 0) {
        arguments.extend(pairs);
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema() -> Schema {
        Schema::new(json!([
            {"name": "do", "meta-type": "command", "arg-type": "Do", "ret-type": "any"},
            {"name": "Do", "meta-type": "object", "members": [
                {"name": "device", "type": "str"},
                {"name": "size", "type": "int"},
                {"name": "force", "type": "bool", "default": null},
                {"name": "bitmaps", "type": "[str]", "default": null},
                {"name": "list", "type": "[Kind]", "default": null},
                {"name": "anything", "type": "any", "default": null},
                {"name": "file", "type": "Ref", "default": null},
            ]},
            {"name": "Kind", "meta-type": "object", "tag": "type",
             "members": [{"name": "type", "type": "KindTag"}],
             "variants": [{"case": "sized", "type": "Sized"}]},
            {"name": "Sized", "meta-type": "object", "members": [{"name": "n", "type": "int"}]},
            {"name": "Ref", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "Kind"}]},
            {"name": "KindTag", "meta-type": "enum", "values": ["sized"]},
            {"name": "[Kind]", "meta-type": "array", "element-type": "Kind"},
            {"name": "[str]", "meta-type": "array", "element-type": "str"},
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "int", "meta-type": "builtin", "json-type": "int"},
            {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
            {"name": "any", "meta-type": "builtin", "json-type": "value"},
        ]))
    }

    fn read(words: &[&str]) -> Value {
        let words: Vec<_> = words.iter().map(|word| word.to_string()).collect();
        Value::Object(parse(&words, "do", &schema()).unwrap())
    }

    #[test]
    fn the_schema_decides_on_types() {
        for (words, expected) in [
            (&["device=1", "size=1"][..], json!({"device": "1", "size": 1})),
            (&["size=1G", "force=on"], json!({"size": 1 << 30, "force": true})),
            (&["size=-1", "force=maybe"], json!({"size": -1, "force": "maybe"})),
            (&["bitmaps=a,b"], json!({"bitmaps": ["a", "b"]})),
            (&["bitmaps.0=a", "bitmaps.1=b,c"], json!({"bitmaps": ["a", "b,c"]})),
            (&["list.0.type=sized", "list.0.n=7"], json!({"list": [{"type": "sized", "n": 7}]})),
            (&["list=[{\"type\":\"sized\"}]"], json!({"list": [{"type": "sized"}]})),
            (&["file=12"], json!({"file": "12"})),
            (&["file.type=sized", "file.n=12"], json!({"file": {"type": "sized", "n": 12}})),
            (&["anything=12"], json!({"anything": 12})),
            (&["unknown=true", "device=x=y"], json!({"unknown": true, "device": "x=y"})),
            (&["{\"size\": 5}", "device=d"], json!({"size": 5, "device": "d"})),
        ] {
            assert_eq!(read(words), expected, "{words:?}");
        }
    }

    #[test]
    fn misuse_is_refused_by_name() {
        for (word, expected) in [("x", "key=value is expected"), ("{x", "not JSON")] {
            let err = parse(&[word.to_string()], "do", &schema()).unwrap_err().to_string();
            assert!(err.contains(word) && err.contains(expected), "{err}");
        }
    }

    #[test]
    fn usage_shows_what_is_needed() {
        assert!(schema().usages()[0].starts_with("do device=… size=… [force=…]"));
    }
}
