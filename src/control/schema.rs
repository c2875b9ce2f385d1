//! What `query-qmp-schema` answers: every command, event and type, in QEMU's form.
//!
//! Types are described by themselves ([`Qapi::describe`](super::qapi::Qapi::describe)), each once,
//! however often it is used and however it refers to itself. Their names have a meaning only
//! inside of one answer.

use std::any::TypeId;
use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::qapi::Object;

/// Types of JSON.
#[derive(Clone, Copy, Debug)]
pub enum Builtin {
    /// A string.
    Str,
    /// An integer.
    Int,
    /// Any number.
    Number,
    /// A boolean.
    Bool,
    /// Null.
    Null,
    /// Anything.
    Any,
}

/// The types described so far.
#[derive(Debug, Default)]
pub struct Schema {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// Whose it is, to notice two types of one name.
    owner: Option<TypeId>,
    value: Value,
}

/// The members of an object, as they are described.
#[derive(Debug, Default)]
pub struct Members {
    members: Vec<Value>,
    tag: Option<&'static str>,
    variants: Vec<Value>,
}

impl Members {
    /// Adds a member.
    pub fn push(&mut self, name: &str, ty: String, optional: bool) {
        let mut member = json!({"name": name, "type": ty});
        if optional {
            member["default"] = Value::Null;
        }
        self.members.push(member);
    }

    /// Says which member decides on the variant.
    pub fn tag(&mut self, name: &'static str) {
        self.tag = Some(name);
    }

    /// Adds what the object is if the tag has this value.
    pub fn variant(&mut self, case: &'static str, ty: String) {
        self.variants.push(json!({"case": case, "type": ty}));
    }
}

impl Schema {
    /// A type of JSON.
    pub fn builtin(&mut self, builtin: Builtin) -> String {
        let (name, json_type) = match builtin {
            Builtin::Str => ("str", "string"),
            Builtin::Int => ("int", "int"),
            Builtin::Number => ("number", "number"),
            Builtin::Bool => ("bool", "boolean"),
            Builtin::Null => ("null", "null"),
            Builtin::Any => ("any", "value"),
        };
        self.add(name, None, || json!({"meta-type": "builtin", "json-type": json_type}))
    }

    /// An array of a type that is described already.
    pub fn array(&mut self, element: String) -> String {
        let name = format!("[{element}]");
        self.add(&name, None, || json!({"meta-type": "array", "element-type": element}))
    }

    /// An enumeration; `T` tells it from others.
    pub fn enumeration<T: 'static>(&mut self, name: &str, words: &[&str]) -> String {
        let members: Vec<_> = words.iter().map(|word| json!({"name": word})).collect();
        self.add(
            name,
            Some(TypeId::of::<T>()),
            || json!({"meta-type": "enum", "members": members, "values": words}),
        )
    }

    /// An object.
    pub fn object<T: Object>(&mut self, name: &str) -> String {
        if self.reserve(name, TypeId::of::<T>()) {
            let mut members = Members::default();
            T::describe_members(&mut members, self);
            let mut value = json!({"meta-type": "object", "members": members.members});
            if let Some(tag) = members.tag {
                value["tag"] = tag.into();
                value["variants"] = members.variants.into();
            }
            self.fill(name, value);
        }
        name.to_string()
    }

    /// One of several types, told apart by their type in JSON.
    pub fn alternate<T: 'static>(
        &mut self,
        name: &str,
        types: &[fn(&mut Schema) -> String],
    ) -> String {
        if self.reserve(name, TypeId::of::<T>()) {
            let members: Vec<_> = types.iter().map(|ty| json!({"type": ty(self)})).collect();
            self.fill(name, json!({"meta-type": "alternate", "members": members}));
        }
        name.to_string()
    }

    /// The types by name.
    pub fn finish(self) -> Vec<Value> {
        let named = |(name, entry): (String, Entry)| {
            let mut value = Map::from_iter([("name".to_string(), Value::String(name))]);
            if let Value::Object(mut rest) = entry.value {
                value.append(&mut rest);
            }
            Value::Object(value)
        };
        self.entries.into_iter().map(named).collect()
    }

    fn add(&mut self, name: &str, owner: Option<TypeId>, value: impl FnOnce() -> Value) -> String {
        match self.entries.get(name) {
            Some(known) => assert!(known.owner == owner, "two types have the name {name}"),
            None => {
                self.entries.insert(name.to_string(), Entry { owner, value: value() });
            }
        }
        name.to_string()
    }

    /// Makes a place for a type before its members are described, since they may refer to it;
    /// false if there is one already.
    fn reserve(&mut self, name: &str, owner: TypeId) -> bool {
        let is_new = !self.entries.contains_key(name);
        self.add(name, Some(owner), || Value::Null);
        is_new
    }

    fn fill(&mut self, name: &str, value: Value) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.value = value;
        }
    }
}
