//! From a JSON value to a command that can be run.
//!
//! ```text
//! {"execute": "name", "arguments": {…}, "id": …}
//! ```

use serde_json::{Map, Value};

use super::command::Command;
use super::commands;
use super::error::{Class, QmpError};
use super::qapi::QmpResult;

/// What a client asks for.
#[derive(Debug)]
pub struct Request {
    /// The client's mark, which the answer repeats, whatever it is.
    pub id: Option<Value>,
    /// What is to be done, or why nothing can be.
    pub call: QmpResult<Call>,
}

/// A command with its arguments, not looked at yet.
#[derive(Debug)]
pub struct Call {
    /// The command's name.
    pub name: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// Whether it is to run out of band.
    pub out_of_band: bool,
}

impl Request {
    /// Reads a request out of what the framer found. `oob` says whether the client may use
    /// `exec-oob`.
    pub fn new(message: Result<Value, String>, oob: bool) -> Request {
        let mut object = match message {
            Ok(Value::Object(object)) => object,
            Ok(_) => return Request::refused("QMP input must be a JSON object"),
            Err(text) => return Request::refused(text),
        };
        let id = object.remove("id");
        Request { id, call: Call::new(object, oob) }
    }

    fn refused(desc: impl Into<String>) -> Request {
        Request { id: None, call: Err(QmpError::generic(desc)) }
    }

    /// Whether it asks to be run at once.
    pub fn is_out_of_band(&self) -> bool {
        matches!(&self.call, Ok(call) if call.out_of_band)
    }
}

impl Call {
    fn new(object: Map<String, Value>, oob: bool) -> QmpResult<Call> {
        let error = |text: String| Err(QmpError::generic(text));
        let mut command: Option<(String, String)> = None;
        let mut arguments = Map::new();
        for (member, value) in object {
            match (member.as_str(), value) {
                ("execute" | "exec-oob", value) if member == "execute" || oob => {
                    let Value::String(name) = value else {
                        return error(format!("QMP input member '{member}' must be a string"));
                    };
                    if let Some((other, _)) = command {
                        return error(format!(
                            "QMP input member '{member}' clashes with '{other}'"
                        ));
                    }
                    command = Some((member, name));
                }
                ("arguments", Value::Object(object)) => arguments = object,
                ("arguments", _) => {
                    return error("QMP input member 'arguments' must be an object".into());
                }
                _ => return error(format!("QMP input member '{member}' is unexpected")),
            }
        }
        match command {
            None => error("QMP input lacks member 'execute'".into()),
            Some((member, name)) => Ok(Call { name, arguments, out_of_band: member == "exec-oob" }),
        }
    }

    /// The command that this client may run now.
    pub fn command(&self, negotiated: bool) -> QmpResult<&'static Command> {
        let not_found = |desc: String| QmpError::new(Class::CommandNotFound, desc);
        if !negotiated && self.name != "qmp_capabilities" {
            let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(not_found(desc.into()));
        }
        let command = commands::find(&self.name)
            .ok_or_else(|| not_found(format!("The command {} has not been found", self.name)))?;
        if self.out_of_band && !command.allows_oob() {
            return Err(QmpError::generic(format!(
                "The command {} does not support OOB",
                self.name
            )));
        }
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn desc(value: Value) -> String {
        Request::new(Ok(value), false).call.unwrap_err().desc
    }

    #[test]
    fn errors_are_those_of_qemu() {
        for (value, expected) in [
            (json!([]), "QMP input must be a JSON object"),
            (json!({}), "QMP input lacks member 'execute'"),
            (json!({"exec": "x"}), "QMP input member 'exec' is unexpected"),
            (json!({"execute": 1}), "QMP input member 'execute' must be a string"),
            (json!({"exec-oob": "x"}), "QMP input member 'exec-oob' is unexpected"),
            (
                json!({"execute": "x", "arguments": []}),
                "QMP input member 'arguments' must be an object",
            ),
        ] {
            assert_eq!(desc(value), expected);
        }
        let both = Request::new(Ok(json!({"exec-oob": "x", "execute": "x"})), true);
        assert!(both.call.unwrap_err().desc.contains("clashes with"));
    }

    #[test]
    fn commands_have_their_time() {
        let call = |name: &str| Request::new(Ok(json!({"execute": name})), false).call.unwrap();
        let err = call("query-version").command(false).unwrap_err();
        assert_eq!(err.class, Class::CommandNotFound);
        assert_eq!(err.desc, "Expecting capabilities negotiation with 'qmp_capabilities'");
        call("qmp_capabilities").command(false).unwrap();
        call("query-version").command(true).unwrap();
        let err = call("nope").command(true).unwrap_err();
        assert_eq!(err.class, Class::CommandNotFound);
        assert_eq!(err.desc, "The command nope has not been found");
        let oob = json!({"exec-oob": "quit"});
        let err = Request::new(Ok(oob), true).call.unwrap().command(true).unwrap_err();
        assert_eq!(err.desc, "The command quit does not support OOB");
    }
}
