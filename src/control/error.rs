//! Errors as QMP clients see them: a class that programs match on, and a sentence.

use std::fmt;

use serde_json::{Value, json};

use crate::error::Error;

/// The classes that QMP has. Almost everything is [`Generic`](Class::Generic); clients that need
/// to know more match on the sentence, so sentences that QEMU has, too, are QEMU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// Anything without a class of its own.
    #[default]
    Generic,
    /// There is no such command, or not now.
    CommandNotFound,
    /// There is no such device.
    DeviceNotFound,
    /// There is no such block job (`block-job-*` only).
    DeviceNotActive,
}

impl Class {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Class::Generic => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotFound => "DeviceNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
        }
    }
}

/// The answer to a command that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// What programs match on.
    pub class: Class,
    /// What people read.
    pub desc: String,
}

impl QmpError {
    /// An error of any class.
    pub fn new(class: Class, desc: impl Into<String>) -> QmpError {
        QmpError { class, desc: desc.into() }
    }

    /// An error of class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError::new(Class::Generic, desc)
    }

    /// The value of an answer's `error` member.
    pub fn to_value(&self) -> Value {
        json!({"class": self.class.name(), "desc": self.desc})
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}

/// For options of the command line, which are read by the same code as commands.
impl From<QmpError> for Error {
    fn from(err: QmpError) -> Error {
        Error::invalid(err.desc)
    }
}

/// The one place where the library's kinds become QMP's classes. A class other than the generic
/// one belongs to certain commands, and those say so themselves.
impl From<Error> for QmpError {
    fn from(err: Error) -> QmpError {
        QmpError::generic(err.to_string())
    }
}
