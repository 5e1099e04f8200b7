//! Parquet files as lines of JSON, which is what the rest of a job reads and writes: one batch of rows is in memory at a time.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::types::{Decimal128Type, Decimal256Type, DecimalType};
use arrow_array::{Array, PrimitiveArray, RecordBatch};
use arrow_json::reader::Decoder;
use arrow_json::writer::{LineDelimited, NullableEncoder};
use arrow_json::{Encoder, EncoderFactory, EncoderOptions, ReaderBuilder, WriterBuilder};
use arrow_schema::{ArrowError, DataType, Field, FieldRef, Schema, SchemaRef, TimeUnit};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

/// Rows in memory at a time.
const BATCH_ROWS: usize = 1024;

/// Of a row group, which is in memory until it is complete.
const ROW_GROUP_BYTES: usize = 64 << 20;

/// The file's columns.
///
/// # Errors
/// It is no Parquet file, or a column's type or compression is one that cannot be carried; the text names the column.
pub(super) fn columns(path: &Path) -> Result<SchemaRef, String> {
    let builder = builder(path).map_err(|error| error.to_string())?;
    for column in builder.metadata().row_groups().iter().flat_map(|group| group.columns()) {
        let compression = column.compression();
        if !matches!(compression, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)) {
            let path = column.column_path().string();
            return Err(format!(
                "the column `{path}` is compressed with {compression}; snappy, zstd or none can be read"
            ));
        }
    }
    let schema = builder.schema();
    for (index, field) in schema.fields().iter().enumerate() {
        if schema.fields()[..index].iter().any(|other| other.name() == field.name()) {
            return Err(format!("there are two columns `{}`", field.name()));
        }
        if let Some((path, data_type)) = unsupported(field) {
            return Err(format!(
                "the column `{path}` has the type {data_type}, which cannot be carried; cast or drop it"
            ));
        }
    }
    Ok(Arc::clone(schema))
}

/// The first part of a column that has no form in JSON from which it comes back the same.
fn unsupported(field: &Field) -> Option<(String, &DataType)> {
    let inner: Vec<&FieldRef> = match field.data_type() {
        DataType::Struct(fields) => fields.iter().collect(),
        DataType::List(inner) => vec![inner],
        DataType::Map(entries, _) => match entries.data_type() {
            DataType::Struct(fields) if fields[0].data_type() == &DataType::Utf8 => vec![&fields[1]],
            _ => return Some((field.name().clone(), field.data_type())),
        },
        DataType::Null
        | DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32
        | DataType::UInt64
        | DataType::Float16
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::Binary
        | DataType::FixedSizeBinary(_)
        | DataType::Decimal128(..)
        | DataType::Decimal256(..)
        | DataType::Date32
        | DataType::Time32(TimeUnit::Millisecond)
        | DataType::Time64(_)
        | DataType::Timestamp(..) => Vec::new(),
        _ => return Some((field.name().clone(), field.data_type())),
    };
    inner.into_iter().find_map(|inner| {
        let (path, data_type) = unsupported(inner)?;
        Some((format!("{}.{path}", field.name()), data_type))
    })
}

fn builder(path: &Path) -> io::Result<ParquetRecordBatchReaderBuilder<File>> {
    let file = File::open(path)?;
    guarded(|| {
        // The types of the Parquet format, of which there are few, and not those that some writer's memory had.
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = ArrowReaderMetadata::load(&file, options).map_err(io::Error::other)?;
        let fields: Vec<FieldRef> = metadata.schema().fields().iter().map(with_offset).collect();
        let options = ArrowReaderOptions::new().with_schema(Arc::new(Schema::new(fields)));
        let metadata = ArrowReaderMetadata::try_new(Arc::clone(metadata.metadata()), options);
        Ok(ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata.map_err(io::Error::other)?))
    })
}

/// Of a timestamp with a time zone, which is always UTC, the zone is written as what needs no table of zones.
fn with_offset(field: &FieldRef) -> FieldRef {
    let data_type = match field.data_type() {
        DataType::Timestamp(unit, Some(_)) => DataType::Timestamp(*unit, Some("+00:00".into())),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(with_offset).collect()),
        DataType::List(inner) => DataType::List(with_offset(inner)),
        DataType::Map(entries, sorted) => DataType::Map(with_offset(entries), *sorted),
        _ => return Arc::clone(field),
    };
    Arc::new(field.as_ref().clone().with_data_type(data_type))
}

/// The reader panics on some damaged files.
fn guarded<T>(read: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let damaged = |_| Err(io::Error::new(io::ErrorKind::InvalidData, "the file is damaged"));
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(damaged)
}

/// The rows of a file, a JSON object a line, nulls among its keys.
pub(super) struct Lines {
    batches: ParquetRecordBatchReader,
    bytes: Vec<u8>,
    /// Bytes of `bytes` that were read.
    read: usize,
}

impl Lines {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let builder = builder(path)?.with_batch_size(BATCH_ROWS);
        let batches = guarded(|| builder.build().map_err(io::Error::other))?;
        Ok(Self { batches, bytes: Vec::new(), read: 0 })
    }
}

impl BufRead for Lines {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.read == self.bytes.len() {
            let batch = guarded(|| self.batches.next().transpose().map_err(io::Error::other))?;
            let Some(batch) = batch else { break };
            self.bytes.clear();
            self.read = 0;
            write_lines(&batch, &mut self.bytes)?;
        }
        Ok(&self.bytes[self.read..])
    }

    fn consume(&mut self, count: usize) {
        self.read += count;
    }
}

impl Read for Lines {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(bytes)?;
        self.consume(count);
        Ok(count)
    }
}

/// Appends a line of JSON a row.
pub(super) fn write_lines(batch: &RecordBatch, bytes: &mut Vec<u8>) -> io::Result<()> {
    let options = WriterBuilder::new().with_explicit_nulls(true).with_encoder_factory(Arc::new(Decimals));
    let mut writer = options.build::<_, LineDelimited>(bytes);
    writer.write(batch).and_then(|()| writer.finish()).map_err(io::Error::other)
}

/// Decimals are texts: a reader of JSON would make numbers of fewer digits of them.
#[derive(Debug)]
struct Decimals;

impl EncoderFactory for Decimals {
    fn make_default_encoder<'a>(
        &self,
        _field: &'a FieldRef,
        array: &'a dyn Array,
        _options: &'a EncoderOptions,
    ) -> Result<Option<NullableEncoder<'a>>, ArrowError> {
        let encoder: Box<dyn Encoder + 'a> = match array.data_type() {
            DataType::Decimal128(..) => Box::new(DecimalTexts(array.as_primitive::<Decimal128Type>())),
            DataType::Decimal256(..) => Box::new(DecimalTexts(array.as_primitive::<Decimal256Type>())),
            _ => return Ok(None),
        };
        Ok(Some(NullableEncoder::new(encoder, array.nulls().cloned())))
    }
}

struct DecimalTexts<'a, T: DecimalType>(&'a PrimitiveArray<T>);

impl<T: DecimalType> Encoder for DecimalTexts<'_, T> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("\"{}\"", self.0.value_as_string(row)).as_bytes());
    }
}

/// Makes batches of lines that are written to it, and hands them to `take`; [`Self::finish`] hands over the last one.
pub(super) struct Batches<F> {
    decoder: Decoder,
    take: F,
}

impl<F: FnMut(RecordBatch) -> io::Result<()>> Batches<F> {
    pub(super) fn new(columns: &SchemaRef, take: F) -> io::Result<Self> {
        // Strict: nothing that a line has is left out of its row.
        let builder = ReaderBuilder::new(Arc::clone(columns)).with_batch_size(BATCH_ROWS).with_strict_mode(true);
        Ok(Self { decoder: builder.build_decoder().map_err(io::Error::other)?, take })
    }

    pub(super) fn finish(&mut self) -> io::Result<()> {
        let batch = self.decoder.flush().map_err(io::Error::other)?;
        batch.map_or(Ok(()), &mut self.take)
    }
}

impl<F: FnMut(RecordBatch) -> io::Result<()>> Write for Batches<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = 0;
        while taken < bytes.len() {
            taken += self.decoder.decode(&bytes[taken..]).map_err(io::Error::other)?;
            if taken < bytes.len() {
                self.finish()?;
            }
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes a file of the lines that `fill` writes. Equal lines give equal bytes.
pub(super) fn write(
    file: impl Write + Send,
    columns: &SchemaRef,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_created_by("nemotron".into())
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
        .build();
    let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
    let mut writer = ArrowWriter::try_new_with_options(file, Arc::clone(columns), options).map_err(io::Error::other)?;
    let mut batches = Batches::new(columns, |batch| writer.write(&batch).map_err(io::Error::other))?;
    fill(&mut batches)?;
    batches.finish()?;
    writer.close().map_err(io::Error::other)?;
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::BufReader;

    use super::*;
    use arrow_array::types::Int32Type;
    use arrow_array::{
        ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float64Array, Int64Array, ListArray,
        NullArray, StringArray, StructArray, TimestampMicrosecondArray, UInt64Array,
    };

    fn table() -> RecordBatch {
        let price = Decimal128Array::from(vec![Some(12_345_678_901_234_567_890_i128), None]);
        let name: ArrayRef = Arc::new(StringArray::from(vec![Some("é\n\""), None]));
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("flag", Arc::new(BooleanArray::from(vec![Some(true), None]))),
            ("whole", Arc::new(Int64Array::from(vec![Some(i64::MIN), None]))),
            ("large", Arc::new(UInt64Array::from(vec![Some(u64::MAX), None]))),
            ("real", Arc::new(Float64Array::from(vec![Some(0.1), None]))),
            ("price", Arc::new(price.with_precision_and_scale(38, 4).unwrap())),
            ("bytes", Arc::new(BinaryArray::from(vec![Some(&b"\xff\0"[..]), None]))),
            ("day", Arc::new(Date32Array::from(vec![Some(-1), None]))),
            ("time", Arc::new(TimestampMicrosecondArray::from(vec![Some(1_700_000_000_123_456), None]))),
            ("zoned", Arc::new(TimestampMicrosecondArray::from(vec![Some(1), None]).with_timezone("UTC"))),
            ("list", Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1), None]), None]))),
            ("object", Arc::new(StructArray::try_from(vec![("name", name)]).unwrap())),
            ("nothing", Arc::new(NullArray::new(2))),
        ];
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true)))
            .unwrap()
    }

    fn save(path: &Path, batch: &RecordBatch) {
        let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
        writer.write(batch).unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn a_file_made_of_the_lines_of_another_has_its_columns_and_rows() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a.parquet"), dir.path().join("b.parquet"));
        save(&first, &table());
        let mut lines = String::new();
        Lines::open(&first).unwrap().read_to_string(&mut lines).unwrap();
        let row: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
        assert_eq!((&row["price"], &row["large"]), (&"1234567890123456.7890".into(), &u64::MAX.into()));
        assert!(lines.ends_with("\"nothing\":null}\n"), "{lines}");
        let schema = columns(&first).unwrap();
        // Through the JSON of the journal too.
        let parsed = |line| serde_json::from_str::<serde_json::Value>(line).unwrap().to_string();
        let fill = |file: &mut dyn Write| lines.lines().try_for_each(|line| writeln!(file, "{}", parsed(line)));
        write(File::create(&second).unwrap(), &schema, fill).unwrap();
        assert_eq!(columns(&second).unwrap(), schema);
        let read = |path| builder(path).unwrap().build().unwrap().next().unwrap().unwrap();
        assert_eq!(read(&second), read(&first));
    }

    #[test]
    fn many_rows_go_through_in_batches_and_give_the_same_bytes_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, true)]));
        let rows = 3 * BATCH_ROWS + 7;
        let files = ["a.parquet", "b.parquet"].map(|name| dir.path().join(name));
        for path in &files {
            let fill = |file: &mut dyn Write| (0..rows).try_for_each(|row| writeln!(file, "{{\"n\":{row}}}"));
            write(File::create(path).unwrap(), &schema, fill).unwrap();
        }
        let [first, second] = files.each_ref().map(|path| std::fs::read(path).unwrap());
        assert!(first == second);
        let lines: Vec<String> = Lines::open(&files[0]).unwrap().lines().map(Result::unwrap).collect();
        assert_eq!((lines.len(), lines[rows - 1].clone()), (rows, format!("{{\"n\":{}}}", rows - 1)));
    }

    #[test]
    fn what_cannot_be_carried_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let inner: ArrayRef = Arc::new(arrow_array::IntervalYearMonthArray::from(vec![1]));
        let column: ArrayRef = Arc::new(StructArray::try_from(vec![("span", inner)]).unwrap());
        save(&path, &RecordBatch::try_from_iter([("outer", column)]).unwrap());
        let error = columns(&path).unwrap_err();
        assert!(error.starts_with("the column `outer.span` has the type Interval"), "{error}");
        std::fs::write(&path, "PAR1 no").unwrap();
        assert!(columns(&path).is_err());
    }

    #[test]
    fn damaged_files_are_errors_or_rows_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        save(&path, &table());
        let whole = std::fs::read(&path).unwrap();
        let mut errors = 0;
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, bytes).unwrap();
            let read = columns(&path).is_ok().then(|| Lines::open(&path)).and_then(Result::ok);
            let rows = read.map(|lines| BufReader::new(lines).lines().collect::<Result<Vec<_>, _>>());
            errors += usize::from(!matches!(rows, Some(Ok(_))));
        }
        assert!(errors > whole.len() / 4, "{errors} of {}", whole.len());
    }
}
