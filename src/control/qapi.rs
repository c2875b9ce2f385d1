//! Types of the wire: what commands take and return, and what events carry.
//!
//! A type is declared once, with [`qapi!`](crate::qapi), and serves three readers: the parser of
//! arguments with QEMU's error texts, the writer of answers, and `query-qmp-schema`. So what the
//! schema says is what the parser takes.
//!
//! ```text
//! qapi! { pub struct … }   object with members         field node_name  ──► member "node-name"
//! qapi! { pub enum … }     one of some words           Option<T>        ──► optional member
//! qapi! { pub union … }    object, members by a tag    Flat<T>          ──► T's members, in place
//! qapi! { pub alternate …} by JSON type                Any              ──► any JSON value
//! ```
//!
//! Errors name the member with its path, `actions[0].data.name`, as QEMU does; and where QEMU names it
//! without, as with a word that is unknown, so do they.

use std::fmt;

use serde_json::{Map, Number, Value};

use super::error::QmpError;
use super::schema::{Builtin, Members, Schema};

/// Result of a command or of reading its arguments.
pub type QmpResult<T> = Result<T, QmpError>;

/// Where in the arguments a value stands.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    parent: Option<&'a At<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Step<'a> {
    Root,
    /// The root of options from a command line, where every leaf is a text.
    Keyval,
    Member(&'a str),
    Index(usize),
}

impl At<'_> {
    /// The arguments themselves.
    pub const ROOT: At<'static> = At { parent: None, step: Step::Root };
    /// The same for `key=value,…` of a command line ([`keyval`](super::keyval)): numbers and
    /// booleans are written as texts.
    pub const KEYVAL: At<'static> = At { parent: None, step: Step::Keyval };

    fn is_keyval(&self) -> bool {
        match self.parent {
            Some(parent) => parent.is_keyval(),
            None => matches!(self.step, Step::Keyval),
        }
    }

    /// What a text of a command line means where this type is expected.
    fn interpret(&self, builtin: Builtin, value: Value) -> QmpResult<Value> {
        let Value::String(text) = &value else { return Ok(value) };
        if !self.is_keyval() {
            return Ok(value);
        }
        let expects = |what: &str| self.expects(what);
        match builtin {
            Builtin::Bool => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(true.into()),
                "off" | "no" | "false" | "n" => Ok(false.into()),
                _ => Err(expects("'on' or 'off'")),
            },
            Builtin::Int => {
                let number = text.parse::<i64>().map(Value::from);
                let number = number.or_else(|_| text.parse::<u64>().map(Value::from));
                number.or_else(|_| {
                    let size = crate::units::parse_size(text);
                    size.map(Value::from).map_err(|_| expects("an integer"))
                })
            }
            Builtin::Number => {
                let number = text.parse::<f64>().ok().and_then(Number::from_f64);
                number.map(Value::Number).ok_or_else(|| expects("a number"))
            }
            _ => Ok(value),
        }
    }

    /// A member of the object here.
    pub fn member<'a>(&'a self, name: &'a str) -> At<'a> {
        At { parent: Some(self), step: Step::Member(name) }
    }

    /// An element of the array here.
    pub fn index(&self, index: usize) -> At<'_> {
        At { parent: Some(self), step: Step::Index(index) }
    }

    /// The value here is not of the type that is expected.
    pub fn mistyped(&self, expected: &str) -> QmpError {
        QmpError::generic(format!("Invalid parameter type for '{self}', expected: {expected}"))
    }

    /// The value here is not one that the type in C, `expected`, can have.
    fn expects(&self, expected: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{self}' expects {expected}"))
    }

    /// The member here is not there.
    pub fn missing(&self) -> QmpError {
        QmpError::generic(format!("Parameter '{self}' is missing"))
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Root | Step::Keyval => Ok(()),
            Step::Index(index) => write!(f, "[{index}]"),
            Step::Member(name) => match self.parent.map(|parent| parent.step) {
                None | Some(Step::Root | Step::Keyval) => f.write_str(name),
                Some(_) => write!(f, ".{name}"),
            },
        }
    }
}

/// A type of the wire. Made by [`qapi!`](crate::qapi) for all but the simplest.
pub trait Qapi: Sized + 'static {
    /// Tells the schema about the type; returns its name there.
    fn describe(schema: &mut Schema) -> String;

    /// Reads a value.
    fn from_value(value: Value, at: &At) -> QmpResult<Self>;

    /// Writes a value.
    fn to_value(&self) -> Value;

    /// Whether an alternate takes this type for the value.
    fn accepts(value: &Value) -> bool;

    /// Takes the member `name` out of an object.
    fn take_member(object: &mut Map<String, Value>, name: &str, at: &At) -> QmpResult<Self> {
        let at = at.member(name);
        let value = object.remove(name).ok_or_else(|| at.missing())?;
        Self::from_value(value, &at)
    }

    /// Puts it into an object as member `name`.
    fn put_member(&self, object: &mut Map<String, Value>, name: &str) {
        object.insert(name.to_string(), self.to_value());
    }

    /// Tells the schema about a member of this type.
    fn describe_member(name: &str, members: &mut Members, schema: &mut Schema) {
        let ty = Self::describe(schema);
        members.push(name, ty, false);
    }
}

/// A type that is an object, so that its members can stand in another one.
pub trait Object: Qapi {
    /// Takes all of its members.
    fn take(object: &mut Map<String, Value>, at: &At) -> QmpResult<Self>;

    /// Puts all of its members.
    fn put(&self, object: &mut Map<String, Value>);

    /// Tells the schema about its members.
    fn describe_members(members: &mut Members, schema: &mut Schema);
}

/// Reads an object that must have no members but those of `T`.
pub fn object_from_value<T: Object>(value: Value, at: &At) -> QmpResult<T> {
    let Value::Object(mut object) = value else { return Err(at.mistyped("object")) };
    let result = T::take(&mut object, at)?;
    match object.keys().next() {
        None => Ok(result),
        Some(name) => {
            Err(QmpError::generic(format!("Parameter '{}' is unexpected", at.member(name))))
        }
    }
}

/// Writes an object.
pub fn object_to_value<T: Object>(object: &T) -> Value {
    let mut map = Map::new();
    object.put(&mut map);
    Value::Object(map)
}

/// The name on the wire of a field: `node_name` is `node-name`, `r#type` is `type`. QEMU has names
/// with an underscore, too: `backing__file` is `backing_file`.
pub fn wire_name(field: &str) -> String {
    let words = field.strip_prefix("r#").unwrap_or(field).split("__");
    words.map(|word| word.replace('_', "-")).collect::<Vec<_>>().join("_")
}

/// A number of a type that is smaller than QEMU reads it first.
fn small_number<T: TryFrom<u64>>(value: &Value, at: &At, expected: &str) -> QmpResult<T> {
    match (value.as_u64(), value.as_i64()) {
        (Some(number), _) => T::try_from(number).map_err(|_| at.expects(expected)),
        (None, Some(_)) => Err(at.expects(expected)),
        (None, None) => Err(at.expects("uint64")),
    }
}

/// A type of JSON itself.
macro_rules! builtin {
    ($type:ty, $builtin:expr, $expected:literal, $accepts:pat, $read:expr, $write:expr) => {
        impl Qapi for $type {
            fn describe(schema: &mut Schema) -> String {
                schema.builtin($builtin)
            }

            fn from_value(value: Value, at: &At) -> QmpResult<Self> {
                let read: fn(Value, &At) -> Option<QmpResult<Self>> = $read;
                let value = at.interpret($builtin, value)?;
                read(value, at).unwrap_or_else(|| Err(at.mistyped($expected)))
            }

            fn to_value(&self) -> Value {
                let write: fn(&Self) -> Value = $write;
                write(self)
            }

            fn accepts(value: &Value) -> bool {
                matches!(value, $accepts)
            }
        }
    };
}

builtin!(
    String,
    Builtin::Str,
    "string",
    Value::String(_),
    |value, _| match value {
        Value::String(text) => Some(Ok(text)),
        _ => None,
    },
    |text| Value::String(text.clone())
);
builtin!(
    bool,
    Builtin::Bool,
    "boolean",
    Value::Bool(_),
    |value, _| value.as_bool().map(Ok),
    |value| Value::Bool(*value)
);
builtin!(
    i64,
    Builtin::Int,
    "integer",
    Value::Number(_),
    |value, _| value.as_i64().map(Ok),
    |value| Value::Number(Number::from(*value))
);
builtin!(
    // QEMU takes negative numbers here and means their two's complement; nobody means that.
    u64,
    Builtin::Int,
    "uint64",
    Value::Number(_),
    |value, at| Some(value.as_u64().ok_or_else(|| at.expects("uint64"))),
    |value| Value::Number(Number::from(*value))
);
builtin!(
    u32,
    Builtin::Int,
    "integer",
    Value::Number(_),
    |value, at| Some(small_number(&value, at, "uint32_t")),
    |value| Value::Number(Number::from(*value))
);
builtin!(
    u16,
    Builtin::Int,
    "integer",
    Value::Number(_),
    |value, at| Some(small_number(&value, at, "uint16_t")),
    |value| Value::Number(Number::from(*value))
);
builtin!(
    f64,
    Builtin::Number,
    "number",
    Value::Number(_),
    |value, _| value.as_f64().map(Ok),
    |value| Number::from_f64(*value).map_or(Value::Null, Value::Number)
);
builtin!((), Builtin::Null, "null", Value::Null, |value, _| value.as_null().map(Ok), |()| {
    Value::Null
});

/// Any JSON value, for what has a shape of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Any(pub Value);

impl Qapi for Any {
    fn describe(schema: &mut Schema) -> String {
        schema.builtin(Builtin::Any)
    }

    fn from_value(value: Value, _: &At) -> QmpResult<Self> {
        Ok(Any(value))
    }

    fn to_value(&self) -> Value {
        self.0.clone()
    }

    fn accepts(_: &Value) -> bool {
        true
    }
}

impl<T: Qapi> Qapi for Vec<T> {
    fn describe(schema: &mut Schema) -> String {
        let element = T::describe(schema);
        schema.array(element)
    }

    fn from_value(value: Value, at: &At) -> QmpResult<Self> {
        let Value::Array(values) = value else { return Err(at.mistyped("array")) };
        let read = |(index, value)| T::from_value(value, &at.index(index));
        values.into_iter().enumerate().map(read).collect()
    }

    fn to_value(&self) -> Value {
        Value::Array(self.iter().map(Qapi::to_value).collect())
    }

    fn accepts(value: &Value) -> bool {
        value.is_array()
    }
}

impl<T: Qapi> Qapi for Box<T> {
    fn describe(schema: &mut Schema) -> String {
        T::describe(schema)
    }

    fn from_value(value: Value, at: &At) -> QmpResult<Self> {
        T::from_value(value, at).map(Box::new)
    }

    fn to_value(&self) -> Value {
        T::to_value(self)
    }

    fn accepts(value: &Value) -> bool {
        T::accepts(value)
    }
}

/// A member that may be absent.
impl<T: Qapi> Qapi for Option<T> {
    fn describe(schema: &mut Schema) -> String {
        T::describe(schema)
    }

    fn from_value(value: Value, at: &At) -> QmpResult<Self> {
        T::from_value(value, at).map(Some)
    }

    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Null, T::to_value)
    }

    fn accepts(value: &Value) -> bool {
        T::accepts(value)
    }

    fn take_member(object: &mut Map<String, Value>, name: &str, at: &At) -> QmpResult<Self> {
        if !object.contains_key(name) {
            return Ok(None);
        }
        T::take_member(object, name, at).map(Some)
    }

    fn put_member(&self, object: &mut Map<String, Value>, name: &str) {
        if let Some(value) = self {
            value.put_member(object, name);
        }
    }

    fn describe_member(name: &str, members: &mut Members, schema: &mut Schema) {
        let ty = T::describe(schema);
        members.push(name, ty, true);
    }
}

/// The members of `T`, in place of a member of its own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Flat<T>(pub T);

impl<T> std::ops::Deref for Flat<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Object> Qapi for Flat<T> {
    fn describe(schema: &mut Schema) -> String {
        T::describe(schema)
    }

    fn from_value(value: Value, at: &At) -> QmpResult<Self> {
        T::from_value(value, at).map(Flat)
    }

    fn to_value(&self) -> Value {
        self.0.to_value()
    }

    fn accepts(value: &Value) -> bool {
        T::accepts(value)
    }

    fn take_member(object: &mut Map<String, Value>, _: &str, at: &At) -> QmpResult<Self> {
        T::take(object, at).map(Flat)
    }

    fn put_member(&self, object: &mut Map<String, Value>, _: &str) {
        self.0.put(object);
    }

    fn describe_member(_: &str, members: &mut Members, schema: &mut Schema) {
        T::describe_members(members, schema);
    }
}

/// Reads the tag of a union.
pub fn take_tag(object: &mut Map<String, Value>, tag: &str, at: &At) -> QmpResult<String> {
    String::take_member(object, tag, at)
}

/// A word that is none of those an enumeration has. QEMU says no path here, and of an element of a list
/// that it has no name.
pub fn unknown_word(at: &At, word: &str) -> QmpError {
    let name = match at.step {
        Step::Member(name) => name,
        Step::Root | Step::Keyval | Step::Index(_) => "null",
    };
    QmpError::generic(format!("Parameter '{name}' does not accept value '{word}'"))
}

/// A union, whose tag can be looked at before other members are.
pub trait Union: Object {
    /// The member that says which one it is.
    const TAG: &'static str;
    /// What it may say.
    const WORDS: &'static [&'static str];
}

/// Looks at the tag of `T`, which stands in place further down, when it is this member's turn. So a bad
/// tag is what an error names, whatever else is wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct TagOf<T>(std::marker::PhantomData<T>);

impl<T: Union> Qapi for TagOf<T> {
    fn describe(schema: &mut Schema) -> String {
        T::describe(schema)
    }

    fn from_value(value: Value, at: &At) -> QmpResult<Self> {
        match value.as_str() {
            Some(word) if T::WORDS.contains(&word) => Ok(TagOf(std::marker::PhantomData)),
            Some(word) => Err(unknown_word(at, word)),
            None => Err(at.mistyped("string")),
        }
    }

    fn to_value(&self) -> Value {
        Value::Null
    }

    fn accepts(value: &Value) -> bool {
        value.is_string()
    }

    fn take_member(object: &mut Map<String, Value>, _: &str, at: &At) -> QmpResult<Self> {
        let at = at.member(T::TAG);
        let tag = object.get(T::TAG).cloned().ok_or_else(|| at.missing())?;
        Self::from_value(tag, &at)
    }

    fn put_member(&self, _: &mut Map<String, Value>, _: &str) {}

    fn describe_member(_: &str, _: &mut Members, _: &mut Schema) {}
}

/// Declares types of the wire; see the [module](crate::control::qapi).
///
/// ```
/// use vublk::control::qapi::{Flat, Qapi};
/// vublk::qapi! {
///     /// Which way.
///     pub enum Way { Up = "up", DownHill = "down-hill" }
/// }
/// vublk::qapi! {
///     /// One step.
///     pub struct Step {
///         /// Where to.
///         pub way: Way,
///         /// How far; 1 if absent.
///         pub step_length: Option<u64>,
///     }
/// }
/// vublk::qapi! {
///     /// Walk or stay.
///     pub union Move by "kind" { Walk(Step) = "walk", Stay(vublk::control::qapi::Nothing) = "stay" }
/// }
/// vublk::qapi! {
///     /// Several moves of somebody.
///     pub struct Who {
///         /// Who.
///         pub name: String,
///         /// What.
///         pub what: Flat<Move>,
///     }
/// }
/// let at = vublk::control::qapi::At::ROOT;
/// let who = Who::from_value(serde_json::json!({"name": "x", "kind": "walk", "way": "up"}), &at);
/// assert!(matches!(who.unwrap().what.0, Move::Walk(Step { way: Way::Up, step_length: None })));
/// ```
#[macro_export]
macro_rules! qapi {
    ($(#[$meta:meta])* pub struct $name:ident {
        $( $(#[$field_meta:meta])* pub $field:ident : $type:ty ),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type, )* }

        impl $crate::control::qapi::Object for $name {
            #[allow(unused_variables)]
            fn take(
                object: &mut serde_json::Map<String, serde_json::Value>,
                at: &$crate::control::qapi::At,
            ) -> $crate::control::qapi::QmpResult<Self> {
                Ok($name {
                    $( $field: $crate::control::qapi::Qapi::take_member(
                        object,
                        &$crate::control::qapi::wire_name(stringify!($field)),
                        at,
                    )?, )*
                })
            }

            #[allow(unused_variables)]
            fn put(&self, object: &mut serde_json::Map<String, serde_json::Value>) {
                $( $crate::control::qapi::Qapi::put_member(
                    &self.$field,
                    object,
                    &$crate::control::qapi::wire_name(stringify!($field)),
                ); )*
            }

            #[allow(unused_variables)]
            fn describe_members(
                members: &mut $crate::control::schema::Members,
                schema: &mut $crate::control::schema::Schema,
            ) {
                $( <$type as $crate::control::qapi::Qapi>::describe_member(
                    &$crate::control::qapi::wire_name(stringify!($field)),
                    members,
                    schema,
                ); )*
            }
        }
        $crate::qapi!(@object $name);
    };
    ($(#[$meta:meta])* pub enum $name:ident {
        $( $(#[$variant_meta:meta])* $variant:ident = $word:literal ),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $( #[doc = concat!("`", $word, "`")] $(#[$variant_meta])* $variant, )* }

        impl $name {
            /// All words, as on the wire.
            pub const WORDS: &'static [&'static str] = &[$( $word ),*];

            /// The word on the wire.
            pub fn word(self) -> &'static str {
                match self { $( $name::$variant => $word, )* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.word())
            }
        }

        impl $crate::control::qapi::Qapi for $name {
            fn describe(schema: &mut $crate::control::schema::Schema) -> String {
                schema.enumeration::<Self>(stringify!($name), Self::WORDS)
            }

            fn from_value(
                value: serde_json::Value,
                at: &$crate::control::qapi::At,
            ) -> $crate::control::qapi::QmpResult<Self> {
                match value.as_str() {
                    $( Some($word) => Ok($name::$variant), )*
                    Some(word) => Err($crate::control::qapi::unknown_word(at, word)),
                    None => Err(at.mistyped("string")),
                }
            }

            fn to_value(&self) -> serde_json::Value {
                self.word().into()
            }

            fn accepts(value: &serde_json::Value) -> bool {
                value.is_string()
            }
        }
    };
    ($(#[$meta:meta])* pub union $name:ident by $tag:literal {
        $( $(#[$variant_meta:meta])* $variant:ident ( $type:ty ) = $word:literal ),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub enum $name {
            $( #[doc = concat!("`", $word, "`")] $(#[$variant_meta])* $variant($type), )*
        }

        impl $name {
            /// The value of the tag.
            pub fn word(&self) -> &'static str {
                match self { $( $name::$variant(_) => $word, )* }
            }
        }

        impl $crate::control::qapi::Union for $name {
            const TAG: &'static str = $tag;
            const WORDS: &'static [&'static str] = &[$( $word ),*];
        }

        impl $crate::control::qapi::Object for $name {
            fn take(
                object: &mut serde_json::Map<String, serde_json::Value>,
                at: &$crate::control::qapi::At,
            ) -> $crate::control::qapi::QmpResult<Self> {
                let tag = $crate::control::qapi::take_tag(object, $tag, at)?;
                match tag.as_str() {
                    $( $word => <$type as $crate::control::qapi::Object>::take(object, at)
                        .map($name::$variant), )*
                    word => Err($crate::control::qapi::unknown_word(&at.member($tag), word)),
                }
            }

            fn put(&self, object: &mut serde_json::Map<String, serde_json::Value>) {
                object.insert($tag.to_string(), self.word().into());
                match self {
                    $( $name::$variant(inner) =>
                        $crate::control::qapi::Object::put(inner, object), )*
                }
            }

            fn describe_members(
                members: &mut $crate::control::schema::Members,
                schema: &mut $crate::control::schema::Schema,
            ) {
                let words = &[$( $word ),*];
                let tag = schema.enumeration::<(Self, u8)>(concat!(stringify!($name), "Tag"), words);
                members.push($tag, tag, false);
                members.tag($tag);
                $(
                    let ty = <$type as $crate::control::qapi::Qapi>::describe(schema);
                    members.variant($word, ty);
                )*
            }
        }
        $crate::qapi!(@object $name);
    };
    ($(#[$meta:meta])* pub alternate $name:ident {
        $( $(#[$variant_meta:meta])* $variant:ident ( $type:ty ) ),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub enum $name { $( $(#[$variant_meta])* $variant($type), )* }

        impl $crate::control::qapi::Qapi for $name {
            fn describe(schema: &mut $crate::control::schema::Schema) -> String {
                schema.alternate::<Self>(
                    stringify!($name),
                    &[$( <$type as $crate::control::qapi::Qapi>::describe ),*],
                )
            }

            fn from_value(
                value: serde_json::Value,
                at: &$crate::control::qapi::At,
            ) -> $crate::control::qapi::QmpResult<Self> {
                $( if <$type as $crate::control::qapi::Qapi>::accepts(&value) {
                    return <$type as $crate::control::qapi::Qapi>::from_value(value, at)
                        .map($name::$variant);
                } )*
                Err(at.mistyped(stringify!($name)))
            }

            fn to_value(&self) -> serde_json::Value {
                match self { $( $name::$variant(inner) =>
                    $crate::control::qapi::Qapi::to_value(inner), )* }
            }

            fn accepts(value: &serde_json::Value) -> bool {
                $( <$type as $crate::control::qapi::Qapi>::accepts(value) )||*
            }
        }
    };
    (@object $name:ident) => {
        impl $crate::control::qapi::Qapi for $name {
            fn describe(schema: &mut $crate::control::schema::Schema) -> String {
                schema.object::<Self>(stringify!($name))
            }

            fn from_value(
                value: serde_json::Value,
                at: &$crate::control::qapi::At,
            ) -> $crate::control::qapi::QmpResult<Self> {
                $crate::control::qapi::object_from_value(value, at)
            }

            fn to_value(&self) -> serde_json::Value {
                $crate::control::qapi::object_to_value(self)
            }

            fn accepts(value: &serde_json::Value) -> bool {
                value.is_object()
            }
        }
    };
}

crate::qapi! {
    /// No arguments, or an empty answer.
    pub struct Nothing {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    crate::qapi! {
        /// A word.
        pub enum Sync { Full = "full", Top = "top" }
    }
    crate::qapi! {
        /// What raw takes.
        pub struct RawOptions {
            /// Where it starts.
            pub offset: Option<u64>,
        }
    }
    crate::qapi! {
        /// A driver's options.
        pub union Options by "driver" { Raw(RawOptions) = "raw", Null(Nothing) = "null-co" }
    }
    crate::qapi! {
        /// A name, or options.
        pub alternate Reference {
            /// A name.
            Name(String),
            /// Options.
            Options(Options),
        }
    }
    crate::qapi! {
        /// All kinds of members.
        pub struct Arguments {
            /// A word.
            pub sync: Option<Sync>,
            /// A signed number.
            pub speed: i64,
            /// A list.
            pub files: Vec<Reference>,
            /// In place.
            pub options: Flat<Options>,
        }
    }

    fn read(value: Value) -> Result<Arguments, String> {
        Arguments::from_value(value, &At::ROOT).map_err(|err| err.desc)
    }

    #[test]
    fn what_was_read_is_written() {
        for value in [
            json!({"speed": -1, "files": [], "driver": "null-co"}),
            json!({"sync": "top", "speed": 5, "driver": "raw", "offset": u64::MAX,
                   "files": ["x", {"driver": "raw"}]}),
        ] {
            assert_eq!(read(value.clone()).unwrap().to_value(), value);
        }
    }

    #[test]
    fn errors_are_those_of_qemu() {
        let base = json!({"speed": 1, "files": [], "driver": "raw"});
        for (change, expected) in [
            (json!({"speed": null}), "Invalid parameter type for 'speed', expected: integer"),
            (json!({"speed": 1.5}), "Invalid parameter type for 'speed', expected: integer"),
            (json!({"speed": 1u64 << 63}), "Invalid parameter type for 'speed', expected: integer"),
            (json!({"sync": "stream"}), "Parameter 'sync' does not accept value 'stream'"),
            (json!({"sync": 1}), "Invalid parameter type for 'sync', expected: string"),
            (json!({"driver": "x"}), "Parameter 'driver' does not accept value 'x'"),
            (json!({"offset": "1"}), "Parameter 'offset' expects uint64"),
            (json!({"files": [{"driver": "x"}]}), "Parameter 'driver' does not accept value 'x'"),
            (json!({"files": 1}), "Invalid parameter type for 'files', expected: array"),
            (
                json!({"files": ["a", 1]}),
                "Invalid parameter type for 'files[1]', expected: Reference",
            ),
            (json!({"files": [{"a": 1}]}), "Parameter 'files[0].driver' is missing"),
            (json!({"files": [{"driver": "raw", "x": 1}]}), "Parameter 'files[0].x' is unexpected"),
            (json!({"x": 1}), "Parameter 'x' is unexpected"),
        ] {
            let mut value = base.clone();
            value.as_object_mut().unwrap().append(&mut change.as_object().unwrap().clone());
            assert_eq!(read(value).unwrap_err(), expected, "{change}");
        }
        assert_eq!(read(json!({})).unwrap_err(), "Parameter 'speed' is missing");
    }

    #[test]
    fn the_schema_says_the_same() {
        let mut schema = Schema::default();
        assert_eq!(Arguments::describe(&mut schema), "Arguments");
        let types = schema.finish();
        let of = |name: &str| types.iter().find(|ty| ty["name"] == name).unwrap().clone();
        assert_eq!(
            of("Arguments"),
            json!({"name": "Arguments", "meta-type": "object", "tag": "driver",
            "members": [
                {"name": "sync", "type": "Sync", "default": null},
                {"name": "speed", "type": "int"},
                {"name": "files", "type": "[Reference]"},
                {"name": "driver", "type": "OptionsTag"},
            ],
            "variants": [
                {"case": "raw", "type": "RawOptions"}, {"case": "null-co", "type": "Nothing"},
            ]})
        );
        assert_eq!(of("Reference")["members"], json!([{"type": "str"}, {"type": "Options"}]));
        assert_eq!(of("[Reference]")["element-type"], "Reference");
        assert_eq!(of("Sync")["values"], json!(["full", "top"]));
        assert_eq!(of("int"), json!({"name": "int", "meta-type": "builtin", "json-type": "int"}));
    }
}
