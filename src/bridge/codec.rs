//! Encoding and decoding by themselves, without an engine.

use crate::codec::stream::{BadStream, Stream, encode};
use crate::error::{Error, Result};
use crate::fence::fence;

fn or_refused<T>(found: std::result::Result<T, BadStream>) -> Result<T> {
    found.map_err(|bad| Error::Invalid(bad.to_string()))
}

pub(super) fn encode_stream(raw: &[u8]) -> Result<Vec<u8>> {
    fence(|| or_refused(encode(raw)))
}

pub(super) fn check_stream(encoded: &[u8], elements: u64) -> Result<()> {
    fence(|| or_refused(Stream::new(encoded, elements).map(|_| ())))
}

pub(super) fn decode_stream(encoded: &[u8], raw: &mut [u8]) -> Result<()> {
    fence(|| {
        let stream = Stream::new(encoded, raw.len() as u64 / 2);
        or_refused(stream.and_then(|stream| stream.decode(raw)))
    })
}
