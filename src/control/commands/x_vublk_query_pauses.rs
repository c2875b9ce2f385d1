//! `x-vublk-query-pauses`: how long changes of the graph have kept guests waiting.

use super::prelude::*;

qapi! {
    /// Pauses, in microseconds.
    pub struct PausesInfo {
        /// How many there were.
        pub count: u64,
        /// The last one.
        pub last_us: u64,
        /// The longest one.
        pub longest_us: u64,
        /// What half of the last thousand did not exceed.
        pub p50_us: u64,
        /// What 99 % of the last thousand did not exceed.
        pub p99_us: u64,
    }
}

pub struct QueryPauses;

impl MainCommand for QueryPauses {
    const NAME: &'static str = "x-vublk-query-pauses";
    const DOC: &'static str = "Tells how long changes of the graph have kept guests waiting.";
    type Arguments = Nothing;
    type Returns = PausesInfo;

    fn run(daemon: &mut Daemon, _: Nothing) -> QmpResult<PausesInfo> {
        let pauses = daemon.disks().graph().pauses();
        let us = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Ok(PausesInfo {
            count: pauses.count,
            last_us: us(pauses.last),
            longest_us: us(pauses.longest),
            p50_us: us(pauses.permille(500)),
            p99_us: us(pauses.permille(990)),
        })
    }
}
