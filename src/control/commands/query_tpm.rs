//! `query-tpm`: clients of QEMU look whether they would have to save a TPM's state. There is none.

use super::prelude::*;

pub struct QueryTpm;

impl QuickCommand for QueryTpm {
    const NAME: &'static str = "query-tpm";
    const DOC: &'static str = "Lists TPM devices: none.";
    type Arguments = Nothing;
    type Returns = Vec<Any>;

    fn run(_: &Shared, _: Nothing) -> QmpResult<Vec<Any>> {
        Ok(Vec::new())
    }
}
