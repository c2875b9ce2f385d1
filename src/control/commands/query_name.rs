//! `query-name`: the name of the virtual machine, as far as we were told one.

use super::prelude::*;

qapi! {
    /// A name.
    pub struct NameInfo {
        /// The name, if there is one.
        pub name: Option<String>,
    }
}

pub struct QueryName;

impl QuickCommand for QueryName {
    const NAME: &'static str = "query-name";
    const DOC: &'static str = "Tells the name that was given to this process.";
    type Arguments = Nothing;
    type Returns = NameInfo;

    fn run(shared: &Shared, _: Nothing) -> QmpResult<NameInfo> {
        Ok(NameInfo { name: shared.name().map(String::from) })
    }
}
