//! `query-version`, whose answer is also in the greeting.

use super::prelude::*;

qapi! {
    /// A version.
    pub struct VersionTriple {
        /// First number.
        pub major: i64,
        /// Second number.
        pub minor: i64,
        /// Third number.
        pub micro: i64,
    }
}

qapi! {
    /// Which QEMU's protocol this is, and whose program.
    pub struct VersionInfo {
        /// The version of QEMU whose commands, events and texts we follow.
        pub qemu: VersionTriple,
        /// Our own name and version.
        pub package: String,
    }
}

/// What the greeting and `query-version` say.
pub fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple { major: 10, minor: 0, micro: 2 },
        package: concat!("vublk ", env!("CARGO_PKG_VERSION")).to_string(),
    }
}

pub struct QueryVersion;

impl QuickCommand for QueryVersion {
    const NAME: &'static str = "query-version";
    const DOC: &'static str = "Tells the version of vublk, and of QEMU whose protocol it speaks.";
    type Arguments = Nothing;
    type Returns = VersionInfo;

    fn run(_: &Shared, _: Nothing) -> QmpResult<VersionInfo> {
        Ok(version())
    }
}
